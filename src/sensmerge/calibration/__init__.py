"""Calibration (floor 3): samples (token ids and loss masks), sensitivities (eq. 1), distances between experts (eq. 4)."""
