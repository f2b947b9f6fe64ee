"""JSON files too large for memory: where their values are, and a value when it is asked for."""

from __future__ import annotations

import json
import os
import re
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pgfast.errors import InputError
from pgfast.strict_json import refuse_constant

from .records import RowError

_PIECE = 4 << 20
"""Bytes read at a time; a value of a list may take four of them."""
_BOM = b"\xef\xbb\xbf"
_CONTINUATION = bytes(range(0x80, 0xC0))
"""The bytes of UTF-8 that begin no character."""
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(parse_constant=refuse_constant)


class JsonSlices:
    """Objects inside a file, by number; any number of threads may read at once.

    Args:
        path: The file; it stays open.
        begin: [N] int64, offset of each object's first byte.
        end: [N] int64, offset after its last.
    """

    def __init__(self, path: Path, begin: NDArray[np.int64], end: NDArray[np.int64]) -> None:
        self._path, self._begin, self._end = path, begin, end
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonSlices, (self._path, self._begin, self._end)  # another process opens the file anew

    def __len__(self) -> int:
        return len(self._begin)

    def take(self, rows: NDArray[np.int64]) -> None:
        """Renumber: row i becomes what was rows[i]."""
        self._begin, self._end = self._begin[rows], self._end[rows]

    def parse(self, row: int) -> dict[str, Any]:
        """Read one object.

        Raises:
            RowError: Not UTF-8, not JSON, or not an object.
        """
        begin, end = int(self._begin[row]), int(self._end[row])
        raw = os.pread(self._file, end - begin, begin)  # has no position that threads would share
        try:
            value = _DECODER.decode(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError("the row is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise RowError(f"the row is not JSON: {error.msg} at column {error.pos + 1}") from error
        except (ValueError, RecursionError) as error:  # NaN, a number of 5,000 digits, brackets 1,000 deep
            raise RowError(f"the row is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise RowError("the row is not a JSON object")
        return value


def find_lines(path: Path) -> JsonSlices:
    r"""Find the lines that are not blank; they end with \n or \r\n, the last one with or without.

    Raises:
        OSError: The file cannot be read.
    """
    begin, end, at = array("q"), array("q"), 0
    with path.open("rb") as file:
        for line in file:
            text = line.removeprefix(_BOM) if at == 0 else line
            at += len(line)
            if text.strip():
                begin.append(at - len(text))
                end.append(at)
    return JsonSlices(path, as_int64(begin), as_int64(end))


def members(path: Path) -> Iterator[tuple[str, Any, int, int]]:
    """Walk over a JSON object: (key, value, begin, end) of each member, and of each item where the value is a list.

    `begin` and `end` are offsets in bytes. Texts are right only as far as they are ASCII: bytes are read as Latin-1, so that
    places in the text are places in the file, and the structure of JSON is the same.

    Raises:
        InputError: Broken JSON, or no object.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        scanner = _Scanner(path, file)
        if scanner.peek() != "{":
            raise InputError(f"{path} holds no JSON object: give the VQAv2 questions, or one object per line in a .jsonl file")
        scanner.take("{")
        if scanner.peek() == "}":
            return
        while True:
            if scanner.peek() != '"':
                raise scanner.broken("a key in quotes is missing")
            key = scanner.value()[0]
            scanner.take(":")
            if scanner.peek() == "[":
                for item in scanner.items():
                    yield key, *item
            else:
                yield key, *scanner.value()
            if scanner.take(",}") == "}":
                break
        if scanner.peek():
            raise scanner.broken("there is more after the end (one object per line is a .jsonl file)")


class _Scanner:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._text, self._at = "", 0  # what is not consumed of the text begins at `_at`
        self._start = 0  # offset of the text in the file
        if self._more() and self._text.startswith(_BOM.decode("latin-1")):
            self._at = len(_BOM)

    def _more(self) -> bool:
        piece = self._file.read(_PIECE)
        if piece:
            self._start += self._at
            self._text = self._text[self._at :] + piece.decode("latin-1")
            self._at = 0
        return bool(piece)

    def peek(self) -> str:
        """Skip white space and return the next character, or nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Consume one of the characters."""
        char = self.peek()
        if not char or char not in wanted:
            raise self.broken(f"{' or '.join(wanted)} is missing")
        self._at += 1
        return char

    def value(self) -> tuple[Any, int, int]:
        """Consume a value: (value, begin, end)."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at < 4 * _PIECE and self._more():
                    continue  # it may only have been cut off
                at = error.pos if isinstance(error, json.JSONDecodeError) else self._at
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise self.broken(reason, at) from error
            if end == len(self._text) and self._more():
                continue  # a number may go on
            begin, self._at = self._at, end
            return value, self._start + begin, self._start + end

    def items(self) -> Iterator[tuple[Any, int, int]]:
        """Consume a list: `value` of each item."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def broken(self, reason: str, at: int | None = None) -> InputError:
        line, column = _line_and_column(self._path, self._start + (self._at if at is None else at))
        return InputError(f"{self._path}: broken JSON at line {line} column {column}: {reason}")


def _line_and_column(path: Path, offset: int) -> tuple[int, int]:
    line = column = 1
    with path.open("rb") as file:
        while offset:
            piece = file.read(min(offset, _PIECE))
            offset -= len(piece)
            head, newline, tail = piece.rpartition(b"\n")
            if newline:
                line += head.count(b"\n") + 1
                column = 1
            column += len(tail.translate(None, _CONTINUATION))
    return line, column


def as_int64(values: array[int]) -> NDArray[np.int64]:
    """Return an array of type "q" as numpy's, in the same memory."""
    return np.asarray(values, dtype=np.int64)
