"""Vocabularies: the tokens of a model, which of its tensors have a row for each, and those rows in another vocabulary's order."""
