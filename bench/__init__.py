"""Bundle to figures: how long a user waits. Installed as `pgfast.bench`."""
