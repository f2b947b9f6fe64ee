"""What the fuzz targets have in common."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
CORPUS = Path(__file__).parent / "corpus"


def instrumented() -> AbstractContextManager[object]:
    """Around imports: what is imported counts as coverage; nothing happens where atheris is missing, as in a replay."""
    if "atheris" not in sys.modules:
        return nullcontext()
    import atheris

    instrument: AbstractContextManager[object] = atheris.instrument_imports()
    return instrument


class Choices:
    """Decisions taken from bytes, so that a small change of the bytes changes one decision; at the end all are the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> bool:
        """Whether there are bytes left."""
        return self._at < len(self._data)

    def number(self, below: int) -> int:
        """Return a number from 0."""
        size = max(1, (below.bit_length() + 7) // 8)
        value = int.from_bytes(self._data[self._at : self._at + size], "little")
        self._at += size
        return value % below

    def one(self, values: Sequence[T]) -> T:
        """Return one of some values."""
        return values[self.number(len(values))]

    def text(self) -> str:
        """Return a short text; any characters but halves of one."""
        length = self.number(32)
        part = self._data[self._at : self._at + length]
        self._at += length
        return part.decode("utf-8", "replace")


def one_line(error: Exception) -> None:
    """Make sure that a message is one line that somebody can read."""
    message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 2000


def fuzz(check: Callable[[bytes], None]) -> None:
    """Run a target with libFuzzer's options from the command line; does not return."""
    import atheris

    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "a target is run as `python -m fuzz.NAME`"
    # a merge starts itself again: libFuzzer gives this, joined with the options, to a shell
    program = f"{shlex.quote(sys.executable)} -m {spec.name}"
    atheris.Setup([program, *sys.argv[1:]], check)
    atheris.Fuzz()
