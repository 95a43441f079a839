"""Measurements; results are kept as JSON with the machine they were made on."""
