"""Experiments (floor 7): grids of merges and the tables that compare them."""
