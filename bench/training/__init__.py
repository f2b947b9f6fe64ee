"""The training step of `train/` against the public recipe."""
