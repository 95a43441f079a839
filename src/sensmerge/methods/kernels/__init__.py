"""Kernels that several methods share; see sensmerge.methods.kernel for what a kernel is.

The columns of `experts` float64 [K, P] mean the same in all kernels of the task-vector family:
FACTOR multiplies the row (w_k c_k and a rescaling), WEIGHT is w_k alone (what a normalising method divides by), LOW and HIGH are
the sparsifier's own two numbers. `groups[0, 0]` is what a plain sum is divided by; `groups[0, 1]` is 1 if an election normalises.
"""

FACTOR, WEIGHT, LOW, HIGH = 0, 1, 2, 3
