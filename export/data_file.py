"""The external-data file of a graph: tensors one after the other, hashed as they are written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.manifest import FileEntry

_ALIGN_LARGE, _ALIGN_SMALL = 4096, 64
"""Byte alignment of tensors: whole pages for those worth mapping into memory."""
_LARGE = 2**20
_WRITE_BACK = 256 * 2**20
"""Bytes after which what was written is pushed to the disk and dropped from memory."""


class DataFile:
    """Writes tensors and remembers where they are.

    Args:
        path: The file to create.
        on_bytes: Called with the number of bytes of each piece.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        self.path, self._on_bytes = path, on_bytes
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._size = self._pushed = 0

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, pieces: Iterable[NDArray[Any]], nbytes: int) -> int:
        """Append a tensor that comes in pieces; returns its offset.

        Args:
            pieces: Runs of rows, in order, in the type they are stored in.
            nbytes: Size of the whole tensor.
        """
        self._write(bytes(-self._size % (_ALIGN_LARGE if nbytes >= _LARGE else _ALIGN_SMALL)))
        offset = self._size
        for piece in pieces:
            self._write(np.ascontiguousarray(piece).view(np.uint8).reshape(-1).data if piece.size else b"")
            self._on_bytes(piece.nbytes)
        assert self._size == offset + nbytes, "a tensor has another size than its graph says"
        return offset

    def finish(self) -> FileEntry:
        """Put everything on the disk and describe the file."""
        self._push()
        return FileEntry(self._hash.hexdigest(), self._size)

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)
        if self._size - self._pushed >= _WRITE_BACK:
            self._push()

    def _push(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._pushed = self._size
