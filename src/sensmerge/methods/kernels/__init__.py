"""Kernels that several methods share; see sensmerge.methods.kernel for what a kernel is.

The columns of `experts` float64 [K, 4] mean the same in all kernels of the task-vector family: 0 multiplies the row (w_k c_k and a
rescaling), 1 is w_k alone (what a normalising method divides by), 2 and 3 are the sparsifier's own two numbers. `groups[0, 0]` is
what a plain sum is divided by, `groups[0, 1]` is 1 if an election normalises, `groups[0, 2]` is 1 if what is kept is divided by its
chance to stay, `groups[0, 3]` multiplies the base in a plain sum.
"""
