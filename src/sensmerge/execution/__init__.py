"""Execution (floor 4): a MergePlan's numbers, and the models' bytes, into the shards of an open staging folder."""
