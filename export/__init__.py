"""Checkpoint to bundle: PaliGemma written as ONNX graphs. Installed as `pgfast.export`."""
