"""Rows to results, in order: pictures are decoded ahead in threads, and the engine's running batch is kept full."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import os
import stat
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from pgfast.errors import ImageError, InputError
from pgfast.types import Answer, EncodedImage, GenerateOptions

from .rows import Failure, Result, Row

if TYPE_CHECKING:
    from pgfast.engine import Engine

THREADS = 24
WINDOW = 1024
"""Rows between the one that is read and the one whose result comes next: a long answer holds up no others."""
HELD_BYTES = 256 * 2**20
"""Pictures inside rows that wait to be decoded; no further row is read while they are more."""
RECENT = 16
"""Pictures that are kept in case they come again."""


def answer_rows(engine: Engine, rows: Iterable[Row], *, options: GenerateOptions | None = None) -> Iterator[Result]:
    """Answer rows; each gets exactly one result, in the order given, and what is wrong with one stays with it.

    Rows are taken a bounded number ahead of the results. Leaving the iterator early cancels what is under way.

    Args:
        engine: A loaded bundle.
        rows: Read lazily, in the thread that asks for results.
        options: How to decode. With a seed, each row adds its number to it, so that equal rows draw differently.

    Raises:
        PgfastError: The engine cannot go on; no row is to blame.
    """
    return _Answering(engine, options).results(rows)


class _Picture:
    """One picture of neighbouring rows, encoded by the first that needs it."""

    def __init__(self, row: Row) -> None:
        self._row: Row | None = row
        self._lock = threading.Lock()
        self._encoded: EncodedImage | InputError | None = None

    def encode(self, engine: Engine) -> EncodedImage:
        with self._lock:
            if self._row is not None:
                row, self._row = self._row, None
                try:
                    self._encoded = engine.encode_image(picture_of(row))
                except InputError as error:
                    self._encoded = error
        assert self._encoded is not None
        if isinstance(self._encoded, InputError):
            raise self._encoded
        return self._encoded


class _Answering:
    def __init__(self, engine: Engine, options: GenerateOptions | None) -> None:
        self._engine, self._options = engine, options or GenerateOptions()
        self._recent: OrderedDict[str, _Picture] = OrderedDict()
        self._held = 0

    def results(self, rows: Iterable[Row]) -> Iterator[Result]:
        window: deque[tuple[Row, Future[Answer] | None]] = deque()
        pool = ThreadPoolExecutor(THREADS, "pgfast-batch")
        try:
            for row in rows:
                window.append(self._start(pool, row))
                while window and (self._done(window[0]) or len(window) >= WINDOW or self._held > HELD_BYTES):
                    yield self._result(*window.popleft())
            while window:
                yield self._result(*window.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, row: Row) -> tuple[Row, Future[Answer] | None]:
        slim = dataclasses.replace(row, picture="") if row.embedded else row
        if row.error is not None:
            return slim, None
        picture = self._recent.pop(row.picture, None) or _Picture(row)
        self._recent[row.picture] = picture  # to the end of the line
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return slim, pool.submit(self._answer, slim, picture)

    def _answer(self, row: Row, picture: _Picture) -> Answer:
        encoded, options = picture.encode(self._engine), self._options
        if options.seed is not None:
            options = dataclasses.replace(options, seed=options.seed + row.number)
        if row.prompt is not None:
            return self._engine.generate(encoded, row.prompt, options=options)
        assert row.question is not None
        how = {"language": row.language, "options": options}
        return self._engine.answer(encoded, row.question, choices=row.choices, **how)

    def _done(self, asked: tuple[Row, Future[Answer] | None]) -> bool:
        return asked[1] is None or asked[1].done()

    def _result(self, row: Row, future: Future[Answer] | None) -> Result:
        if future is None:
            return Result(row, error=row.error)
        try:
            return Result(row, future.result())
        except InputError as error:
            return Result(row, error=Failure.of(error))


def picture_of(row: Row) -> str | bytes:
    """Return what the engine takes as the row's picture: a path, or the bytes of a file.

    Raises:
        ImageError: It is no file, or not base64.
    """
    if not row.embedded:
        try:
            regular = stat.S_ISREG(os.stat(row.picture).st_mode)
        except (OSError, ValueError):  # the engine says what is wrong
            return row.picture
        if not regular and not os.path.isdir(row.picture):  # a pipe, for example, would be waited for
            raise ImageError(f"{row.picture} is not a file")
        return row.picture
    head, comma, data = row.picture.partition(",") if row.picture.startswith("data:") else ("", ",", row.picture)
    if not comma or (head and not head.endswith(";base64")):
        raise ImageError("the data URI is not base64: it should begin like data:image/png;base64,")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the picture in the row is not base64: {error}") from error
