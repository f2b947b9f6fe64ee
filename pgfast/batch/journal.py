"""OUT of `pgfast batch`: one line per row, in order, so that the number of whole lines says where to go on after a kill."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pgfast.bundle import Bundle
from pgfast.errors import InputError, PgfastError
from pgfast.loading import demo_bundle
from pgfast.types import GenerateOptions, Timings
from pgfast.validation import check_options

from .rows import Failure, Result, Row, Survey
from .sources import Source

FORMAT = 2
"""2: with calibrated and unsure_of."""
_ERROR = b'"error": {'
"""In a line of JSON only where the row failed: quotes inside texts are escaped."""
_NO_ERROR = b",,\n"
"""The end of a CSV record whose last two cells, those of the error, are empty; one with an error never ends so."""


class Journal:
    """The results of one run, appended one by one; `with` or `close` lets go of it.

    Beside OUT lies OUT.run.json, which says what the run is, so that no other run is continued by mistake.

    Args:
        path: OUT, a .jsonl or .csv file.
        run: What decides the results, as JSON has it: `input`, `bundle` and `options`, each with values by name. An
            `input` of None is one that cannot be read again, so a run that was cut off cannot go on.
        timings: Write the seconds of each answer too.

    Raises:
        InputError: OUT belongs to another run or to none, is in use by another process, or cannot be opened.
        PgfastError: The disk is full.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any], *, timings: bool = False) -> None:
        self._path, self._run, self._timings = Path(path), json.loads(json.dumps(dict(run))), timings
        self._is_csv = check_out(self._path) == ".csv"
        self.rows = 0
        """Results that are there."""
        self.errors = 0
        """How many of them are errors."""
        self.finished = False
        """Whether all rows are there."""
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            raise InputError(f"{self._path} cannot be written: {getattr(error, 'strerror', error)}") from error
        try:
            self._lock()
            self._continue()
        except OSError as error:
            self.close()
            raise self._failure(error) from error
        except BaseException:
            self.close()
            raise

    def append(self, result: Result) -> None:
        """Write the result of the next row; once this returns, no kill takes it away.

        Raises:
            PgfastError: The disk is full, for example. All results before this one are safe.
        """
        assert result.row.number == self.rows, f"row {result.row.number} where row {self.rows} comes next"
        try:
            self._write(result)
        except OSError as error:
            raise self._failure(error) from error
        self.rows += 1
        self.errors += result.error is not None

    def recount(self) -> None:
        """Count the rows again: an interrupt may have come between the writing of one and its counting."""
        self.rows = self.errors = 0
        self._count()

    def finish(self) -> None:
        """Note that all rows are there.

        Raises:
            PgfastError: As in `append`.
        """
        try:
            os.fsync(self._file)
            size = os.fstat(self._file).st_size
            self._describe({"rows": self.rows, "errors": self.errors, "bytes": size})
        except OSError as error:
            raise self._failure(error) from error
        self.finished = True

    def close(self) -> None:
        """Let go of OUT, so that another process may take it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _description(self) -> Path:
        return self._path.with_name(f"{self._path.name}.run.json")

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise InputError(f"{self._path} is not a file: results are appended to one")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self._path} is in use: another process writes results into it") from error

    def _continue(self) -> None:
        """Find out which rows are there, and make OUT end with the last whole one."""
        size = os.fstat(self._file).st_size
        finished = self._check_run() if size else None
        if finished is not None and finished["bytes"] == size:
            self.rows, self.errors, self.finished = finished["rows"], finished["errors"], True
            return
        end = self._count()
        os.ftruncate(self._file, end)  # a kill may have torn the last line
        self._describe(None)
        if self._is_csv and not end:
            self._write(None)

    def _check_run(self) -> dict[str, int] | None:
        """Make sure that OUT belongs to this run; returns what was noted at its end."""
        try:
            known = json.loads(self._description.read_text(encoding="utf-8"))
            described, before, end = known["format"], known["run"], known["finished"]
            finished = None if end is None else {key: int(end[key]) for key in ("rows", "errors", "bytes")}
        except FileNotFoundError as error:
            raise InputError(f"{self._path} is there already, and not as a run's results: {_WAY_OUT}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._description} is damaged: {_WAY_OUT}") from error
        if described != FORMAT:
            raise InputError(f"{self._path} was written by another version of pgfast: {_WAY_OUT}")
        if self._run.get("input") is None:
            raise InputError(f"{self._path} is there already, and rows from stdin cannot be read again: {_WAY_OUT}")
        if before != self._run:
            raise InputError(f"{self._path} holds another run: {_difference(before, self._run)}; {_WAY_OUT}")
        return finished

    def _count(self) -> int:
        """Count whole records; returns the offset behind the last one."""
        place = end = quotes = 0
        header = self._is_csv
        with open(self._file, "rb", buffering=2**20, closefd=False) as file:
            file.seek(0)
            for line in file:
                place += len(line)
                if self._is_csv:
                    quotes += line.count(b'"')  # a line end inside of quotes belongs to a cell
                if quotes % 2 or not line.endswith(b"\n"):
                    continue
                end = place
                if not header:
                    self.rows += 1
                    self.errors += not line.endswith(_NO_ERROR) if self._is_csv else _ERROR in line
                header = False
        return end

    def _write(self, result: Result | None) -> None:
        """Append a result, or for None the header of a CSV file."""
        record = (result or Result(Row(0))).record(timings=self._timings)
        if self._is_csv:
            cells = _cells(record)
            text = _csv_line(cells.keys() if result is None else cells.values())
        else:
            text = json.dumps(record, ensure_ascii=False) + "\n"
        # half a character, from a file name that is not UTF-8, becomes its escape; in JSON that is the same text
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        while left:
            left = left[os.write(self._file, left) :]

    def _describe(self, finished: dict[str, int] | None) -> None:
        """Write the description, at once or not at all."""
        partial = self._path.with_name(f".{self._description.name}.partial")
        text = json.dumps({"format": FORMAT, "run": self._run, "finished": finished}, indent=2, ensure_ascii=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._description)

    def _failure(self, error: OSError) -> PgfastError:
        return PgfastError(f"{self._path} cannot be written: {error.strerror}; mend that and run the same command again")


_WAY_OUT = "give another OUT, or remove it to start anew"


def check_out(path: Path) -> str:
    """Return .jsonl or .csv.

    Raises:
        InputError: OUT has neither ending.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise InputError(f"{path} is no output: its name should end with .jsonl or .csv")
    return path.suffix


def describe_run(
    source: Source, survey: Survey, model: str | None, options: GenerateOptions, *, timings: bool = False
) -> dict[str, Any]:
    """Return what decides the results of a run, for `Journal`.

    Args:
        source: Where the rows come from.
        survey: What it says of itself.
        model: The bundle's folder; None: the demo model.
        options: How to decode.
        timings: Whether the seconds are written.

    Raises:
        InputError: An option is out of range.
        BundleError: There is no such bundle.
    """
    manifest = Bundle.open(Path(model) if model is not None else demo_bundle()).manifest
    check_options(options, manifest.limits.new_tokens)
    bundle = {"sha256": manifest.digest(), "template": manifest.prompts["answer"]}
    return {
        "input": None if survey.sha256 is None else {"kind": source.kind, "sha256": survey.sha256},
        "bundle": bundle | {"temperature": manifest.calibration and manifest.calibration.temperature},
        "options": {**asdict(source.defaults), **asdict(options), "timings": timings},
    }


def _cells(record: dict[str, Any]) -> dict[str, Any]:
    """Flatten a record; the error comes last (`_NO_ERROR`)."""
    cells = dict(record)
    if cells["choices"] is not None:
        cells["choices"] = json.dumps(cells["choices"], ensure_ascii=False)
    if "timings" in cells:
        timings = cells.pop("timings") or {}
        cells |= {f"seconds_{field.name}": timings.get(field.name) for field in fields(Timings)}
    error = cells.pop("error") or {}
    return cells | {f"error_{field.name}": error.get(field.name) for field in fields(Failure)}


def _csv_line(cells: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)  # which makes it quote cells with either of the two
    return line.getvalue()[:-2] + "\n"


def _difference(before: Any, now: Any, name: str = "") -> str:
    """Say what the first difference of two runs is."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
        return _difference(before.get(key), now.get(key), f"{name} {key}".strip())
    return f"{name} was {json.dumps(before)[:80]} and is {json.dumps(now)[:80]}"
