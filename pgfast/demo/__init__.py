"""The embedded bundle (`bundle/`) and a picture to try it on."""
