"""An independent float64 reading of Sens-Merging (arXiv 2502.12420): it shares no code with `sensmerge`."""
