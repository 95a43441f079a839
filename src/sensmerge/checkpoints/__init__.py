"""Checkpoints on disk (floor 2): reading tensors with plain reads, naming their parts, writing shards that cannot be half done."""
