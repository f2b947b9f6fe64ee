"""One walk over all rows before training: what cannot be used is found before hours are spent."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pgfast.image_files import MAX_PIXELS, open_header

from .records import Dataset, Record, RowError

Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, message)"""
_ROWS_BETWEEN_REPORTS = 1000
_THREADS = 8
"""Opening a header mostly waits for the disk."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    row: int
    id: int | str | None
    """None where the row could not be read that far."""
    reason: str


@dataclass(frozen=True, slots=True)
class Preflight:
    """What `check` found."""

    rows: int
    pictures: int
    """Different ones, among the rows that could be read."""
    good: NDArray[np.int64]
    """Rows that can be used, ascending."""
    bad: list[BadRow]
    """The others, ascending."""

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows are bad for each reason, most frequent first; what stands behind a colon in a reason is left out."""
        return dict(Counter(bad.reason.split(":")[0] for bad in self.bad).most_common())

    def write_report(self, path: Path) -> None:
        """Write the bad rows as JSONL: row (from 0), id, reason."""
        with path.open("w", encoding="utf-8") as file:
            for bad in self.bad:
                file.write(json.dumps({"row": bad.row, "id": bad.id, "reason": bad.reason}) + "\n")


def check(
    dataset: Dataset, encode: Callable[[Record], object], *, on_progress: Progress = lambda stage, done, total, message: None
) -> Preflight:
    """Read every row, encode its texts, and open every picture's header, each picture once.

    Args:
        dataset: The rows.
        encode: Raises `RowError` for a record whose texts cannot be used.
        on_progress: Called every thousand rows and pictures, and at the end of each.
    """
    bad, row_of = dict[int, BadRow](), dict[int | str, int]()
    number_of = dict[str, int]()  # picture -> its number, in the order of appearance
    first_rows = list[int]()  # [pictures]
    pictures = np.full(len(dataset), -1)  # [rows], number of each one's picture
    for row in range(len(dataset)):
        record = None
        try:
            record = dataset.record(row)
            if row_of.setdefault(record.id, row) != row:
                raise RowError(f"another row has the same question_id: row {row_of[record.id]}")
            encode(record)
        except RowError as error:
            bad[row] = BadRow(row, record.id if record else None, str(error))
        else:
            number = number_of.setdefault(record.picture, len(number_of))
            if number == len(first_rows):
                first_rows.append(row)
            pictures[row] = number
        if (row + 1) % _ROWS_BETWEEN_REPORTS == 0 or row + 1 == len(dataset):
            on_progress("rows", row + 1, len(dataset), f"{len(bad)} bad")
    faults = _check_pictures(dataset, first_rows, on_progress)
    for row in np.flatnonzero(np.isin(pictures, list(faults))).tolist():
        bad[row] = BadRow(row, dataset.record(row).id, faults[int(pictures[row])])
    is_good = np.ones(len(dataset), dtype=bool)
    is_good[list(bad)] = False
    return Preflight(len(dataset), len(first_rows), np.flatnonzero(is_good), [bad[row] for row in sorted(bad)])


def _check_pictures(dataset: Dataset, rows: list[int], on_progress: Progress) -> dict[int, str]:
    """Return picture number -> what is wrong with it; picture i is that of rows[i]."""
    from PIL import Image

    def fault(row: int) -> str | None:
        try:
            _open_header(dataset, row)
        except RowError as error:
            return str(error)
        return None

    faults = dict[int, str]()
    # the filters are global, so they are set once around all threads
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS refuses it in our words
        for start in range(0, len(rows), _ROWS_BETWEEN_REPORTS):
            piece = rows[start : start + _ROWS_BETWEEN_REPORTS]
            faults |= {number: reason for number, reason in enumerate(pool.map(fault, piece), start) if reason is not None}
            on_progress("pictures", start + len(piece), len(rows), f"{len(faults)} bad")
    return faults


def _open_header(dataset: Dataset, row: int) -> None:
    from PIL import Image, UnidentifiedImageError

    image = dataset.image(row)
    if not isinstance(image, str | os.PathLike | bytes):
        return  # decoded already
    name = "" if isinstance(image, bytes) else f": {image}"
    try:
        with io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file:
            width, height = open_header(file).size
    except FileNotFoundError as error:
        raise RowError(f"the picture does not exist{name}") from error
    except UnidentifiedImageError as error:
        raise RowError(f"the picture is in no known format{name}") from error
    except Image.DecompressionBombError as error:
        raise RowError(f"the picture has more than {MAX_PIXELS:,} pixels{name}") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
        raise RowError(f"the picture cannot be opened: {error}") from error
    if width * height > MAX_PIXELS:
        raise RowError(f"the picture has more than {MAX_PIXELS:,} pixels{name}")
