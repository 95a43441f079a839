"""What merging costs, over the floor of reading the inputs and writing the output."""
