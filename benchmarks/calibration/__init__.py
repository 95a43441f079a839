"""What calibration costs, over a plain batched forward and backward pass and over the size of the weights."""
