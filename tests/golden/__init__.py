"""Merges that mergekit itself made of a tiny family, kept as numbers: `sensmerge` must give the same."""
