"""A LoRA adapter on a base, read as the model that PEFT's `merge_and_unload` would give; nothing is saved on the way."""
