"""The HTTP server: requests in, answers of the engine out."""
