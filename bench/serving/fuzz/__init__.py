"""Requests that no client should send."""
