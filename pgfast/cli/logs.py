"""How log messages look on stderr."""

from __future__ import annotations

import logging
from typing import Any

from . import printable

LONGEST = 500
"""Characters of a line."""


class OneLine(logging.Formatter):
    """Messages may hold what strangers sent: one line each, nothing that a terminal obeys; a bug keeps its traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message as one line."""
        return printable(super().formatMessage(record))[:LONGEST]

    def formatException(self, ei: Any) -> str:
        """Return the traceback, indented."""
        return "\n".join("    " + printable(line)[:LONGEST] for line in super().formatException(ei).splitlines())


def name_the_program() -> None:
    """Begin the library's warnings with the program's name, where nothing else has set up logging."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(OneLine("pgfast: %(message)s"))
