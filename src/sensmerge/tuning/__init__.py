"""Tuning (floor 5): what is chosen by the loss of the merged model."""
