"""Sessions, cache and token loop: tensors and ids, no text and no pictures."""
