"""IN of `pgfast batch`: rows of a JSONL or CSV file, of a folder of pictures, or of stdin, read one by one."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

from pgfast.errors import InputError
from pgfast.strict_json import refuse_constant

from .folder import FolderSource
from .rows import KEYS, Defaults, Row, RowError, Survey, failed, to_row

MAX_ROW_BYTES = 64 * 2**20
"""A longer line is an error row; its end is found without holding it."""
CHOICE_SEPARATOR = "|"
"""Between the choices in a cell of a CSV file."""
_BLOCK = 2**20
_BOM = b"\xef\xbb\xbf"


class Source(Protocol):
    """Rows to be answered."""

    kind: str
    """jsonl, csv, folder or stdin."""
    defaults: Defaults
    ignored: set[str]
    """Keys that rows had and nobody reads, as far as they were met."""

    def survey(self) -> Survey:
        """Look at the whole input once.

        Raises:
            InputError: It cannot be read.
        """

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """Yield rows in the order of the input, holding one at a time.

        Args:
            skip: Rows to pass over at the beginning, without a look at them.

        Raises:
            InputError: The input cannot be read any further.
        """


def open_source(path: str, defaults: Defaults | None = None) -> Source:
    """Open what `pgfast batch` takes as IN.

    Args:
        path: A .jsonl or .csv file, a folder, or - for JSONL from stdin.
        defaults: For rows that say nothing themselves.

    Raises:
        InputError: There is no such input, or it is of another kind.
    """
    defaults = defaults or Defaults()
    if "\0" in path:
        raise InputError("a null byte is in the name of the input")
    if path == "-":
        return StdinSource(defaults)
    if os.path.isdir(path):
        return FolderSource(path, defaults)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".jsonl", ".ndjson"):
        return JsonlSource(path, defaults)
    if suffix == ".csv":
        return CsvSource(path, defaults)
    raise InputError(f"{path} is no input: give a .jsonl or .csv file, a folder of pictures, or - for JSONL from stdin")


class JsonlSource:
    """One object per line; blank lines are no rows."""

    kind = "jsonl"

    def __init__(self, path: str, defaults: Defaults) -> None:
        self._path, self.defaults = path, defaults
        self.ignored: set[str] = set()
        with _reading(path):
            pass

    def survey(self) -> Survey:
        """See `Source.survey`."""
        return _survey_file(self._path)

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """See `Source.rows`."""
        with _reading(self._path) as file:
            yield from self._rows(file, os.path.dirname(self._path), skip)

    def _rows(self, file: BinaryIO, folder: str, skip: int) -> Iterator[Row]:
        number = -1
        for line in _lines(file):
            if not line or line.isspace():
                continue
            number += 1
            if number >= skip:
                yield self._row(number, line, folder)

    def _row(self, number: int, line: bytes, folder: str) -> Row:
        try:
            if len(line) > MAX_ROW_BYTES:
                raise RowError(f"the row has more than {MAX_ROW_BYTES:,} bytes")
            fields = _parse(line)
        except RowError as error:
            return failed(Row(number), error)
        if isinstance(fields, dict):
            self.ignored.update(fields.keys() - KEYS)
        return to_row(number, fields, folder, self.defaults)


class StdinSource(JsonlSource):
    """JSONL from stdin; paths are relative to the current folder."""

    kind = "stdin"

    def __init__(self, defaults: Defaults) -> None:
        self.defaults = defaults
        self.ignored = set()

    def survey(self) -> Survey:
        """Nothing is known of it."""
        return Survey(None, None)

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """See `Source.rows`."""
        yield from self._rows(sys.stdin.buffer, "", skip)


class CsvSource:
    """Cells separated by commas, under a header with names of `KEYS`; an empty cell is none."""

    kind = "csv"

    def __init__(self, path: str, defaults: Defaults) -> None:
        self._path, self.defaults = path, defaults
        with _reading(path) as file:
            header = next(_cells(file), None)
        if not header or isinstance(header, RowError):
            raise InputError(f"{path} has no header: its first line should name the columns, such as image,question")
        self._header = [name.strip() for name in header]
        self.ignored = set(self._header) - set(KEYS)
        if twice := {name for name in KEYS if self._header.count(name) > 1}:
            raise InputError(f"{path} has the column {min(twice)!r} twice")
        if "image" not in self._header:
            raise InputError(f"{path} has no column 'image': its first line should name the columns, such as image,question")

    def survey(self) -> Survey:
        """See `Source.survey`."""
        survey = _survey_file(self._path)
        return Survey(survey.sha256, max((survey.rows or 0) - 1, 0))

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """See `Source.rows`."""
        folder = os.path.dirname(self._path)
        with _reading(self._path) as file:
            for number, cells in enumerate(_cells(file), -1):
                if number >= skip:
                    yield self._row(number, cells, folder)

    def _row(self, number: int, cells: list[str] | RowError, folder: str) -> Row:
        if isinstance(cells, RowError):
            return failed(Row(number), cells)
        if len(cells) != len(self._header):
            return failed(Row(number), RowError(f"the row has {len(cells)} cells, the header {len(self._header)}"))
        fields: dict[str, Any] = {name: cell for name, cell in zip(self._header, cells, strict=True) if cell}
        if "choices" in fields:
            fields["choices"] = [choice.strip() for choice in fields["choices"].split(CHOICE_SEPARATOR)]
        return to_row(number, fields, folder, self.defaults)


@contextmanager
def _reading(path: str) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", buffering=_BLOCK) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _survey_file(path: str) -> Survey:
    digest, lines, block = hashlib.sha256(), 0, b""
    with _reading(path) as file:
        while piece := file.read(_BLOCK):
            block = piece
            digest.update(block)
            lines += block.count(b"\n")
    return Survey(digest.hexdigest(), lines + (block[-1:] not in (b"", b"\n")))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines, of those that are too long only enough to see it."""
    first = True
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
        yield line.removeprefix(_BOM) if first else line
        first = False


def _cells(file: BinaryIO) -> Iterator[list[str] | RowError]:
    """Yield the cells of each row, the header first, or what is wrong with it; blank lines are left out."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # the module's own limit is too small for a picture
    too_long = False

    def lines() -> Iterator[str]:
        nonlocal too_long
        for line in _lines(file):
            long = len(line) > MAX_ROW_BYTES
            too_long |= long
            # a path need not be UTF-8; a question is refused later
            yield "" if long else line.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), strict=True)  # rather an error row than a guess
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield RowError(f"the row is not CSV: {error}")
            continue
        if too_long:
            too_long = False
            yield RowError(f"the row has more than {MAX_ROW_BYTES:,} bytes")
        elif cells is None:
            return
        elif cells:
            yield cells


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError("the row is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"the row is not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"the row is not JSON: {error}") from error
