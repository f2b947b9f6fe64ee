"""`pgfast serve` and `pgfast batch` under load, over capacity, fed with rubbish, and killed."""
