"""Fuzz targets: what reads files and texts of strangers, under atheris; `python -m fuzz.run --seconds 600` runs them all."""
