"""`python -m pgfast`."""

from pgfast.cli import main

main()
