"""Data to fine-tuned checkpoint. Installed as `pgfast.train`."""
