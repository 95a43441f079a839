"""Independent float64 readings of Sens-Merging (arXiv 2502.12420) and of every merge method.

They share no code with `sensmerge`, but for the random draws, whose numbers are part of what a recipe means.
"""
