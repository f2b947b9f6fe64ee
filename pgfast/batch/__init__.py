"""Many questions from a file or a folder: `pgfast batch`."""
