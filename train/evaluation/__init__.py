"""How right a bundle or a checkpoint is on a data set: answers, scores, the worst errors (no torch for a bundle)."""
