"""Rows to results, in order: pictures are decoded ahead in threads, and the engine's running batch is kept full."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import os
import queue
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING

from pgfast.engine import ENCODED_AHEAD
from pgfast.errors import ImageError, InputError, PgfastError
from pgfast.pictures import RECENT
from pgfast.runtime.model import TOGETHER
from pgfast.types import EncodedImage, GenerateOptions, PreparedImage

from .rows import Failure, Result, Row

if TYPE_CHECKING:
    from pgfast.engine import Engine
    from pgfast.pending import Pending

WINDOW = 1024
"""Rows between the one that is read and the one whose result comes next: a long answer holds up no others."""
PLACES = 32
"""Pictures that are read and decoded ahead of the vision encoder; one inside its row takes a place for each `PLACE_BYTES`."""
PLACE_BYTES = 8 * 2**20


def answer_rows(
    engine: Engine, rows: Iterable[Row], *, options: GenerateOptions | None = None, threads: int | None = None
) -> Generator[Result]:
    """Answer rows; each gets exactly one result, in the order given, and what is wrong with one stays with it.

    Rows are taken a bounded number ahead of the results. Leaving the iterator early cancels what is under way.

    Args:
        engine: A loaded bundle, without `max_waiting`.
        rows: Read lazily, in the thread that asks for results.
        options: How to decode. With a seed, each row adds its number to it, so that equal rows draw differently.
        threads: How many decode pictures; None: one per core, from 4 to 16.

    Raises:
        PgfastError: The engine cannot go on; no row is to blame.
    """
    threads = threads or min(max(os.cpu_count() or 1, 4), 16)
    return _Answering(engine, options or GenerateOptions()).results(rows, threads)


class _Picture:
    """A picture of one or several rows near each other."""

    def __init__(self, prepared: Future[tuple[PreparedImage, float]], places: int) -> None:
        self.prepared = prepared
        self.places = places
        """Those of `PLACES` that it takes until it is encoded."""
        self.encoded: EncodedImage | None = None
        self.seconds = (0.0, 0.0)
        """What decoding and the vision encoder took; for the first row that asks about it."""


class _Asked:
    """A row on its way; without its picture, for there are many of them."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.submitted: Future[tuple[Pending, tuple[float, float]]] = Future()
        """With the seconds of its picture."""

    @property
    def done(self) -> bool:
        """Whether `result` has something to return or to raise at once."""
        s = self.submitted
        return self.row.error is not None or (s.done() and (s.exception() is not None or s.result()[0].done))

    def result(self) -> Result:
        if self.row.error is not None:
            return Result(self.row, error=self.row.error)
        try:
            pending, (preprocess, vision) = self.submitted.result()
            answer = pending.result()
        except InputError as error:
            return Result(self.row, error=Failure.of(error))
        timings = dataclasses.replace(answer.timings, preprocess=answer.timings.preprocess + preprocess, vision=vision)
        return Result(self.row, dataclasses.replace(answer, timings=timings))

    def cancel(self) -> None:
        if self.submitted.done() and self.submitted.exception() is None:
            self.submitted.result()[0].cancel()


class _Answering:
    """One run of `answer_rows`: the caller's thread reads rows and yields results, others decode, one feeds the engine."""

    def __init__(self, engine: Engine, options: GenerateOptions) -> None:
        self._engine, self._options = engine, options
        self._recent: OrderedDict[str, _Picture] = OrderedDict()
        self._to_feed = queue.SimpleQueue[tuple[_Asked, _Picture] | None]()
        self._stopping = False
        # semaphores that Ctrl-C cannot leave locked
        self._places, self._room = queue.SimpleQueue[None](), queue.SimpleQueue[None]()
        for _ in range(PLACES):
            self._places.put(None)
        for _ in range(engine.load_figures().slots + ENCODED_AHEAD):
            self._room.put(None)

    def results(self, rows: Iterable[Row], threads: int) -> Generator[Result]:
        window: deque[_Asked] = deque()
        pool = ThreadPoolExecutor(threads, "pgfast-decode")
        feeder = threading.Thread(target=self._feed, name="pgfast-feed", daemon=True)
        feeder.start()
        try:
            for row in rows:
                window.append(self._enter(row, pool))
                while window and (len(window) >= WINDOW or window[0].done):
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            self._stopping = True
            pool.shutdown(cancel_futures=True)
            self._to_feed.put(None)
            self._room.put(None)  # in case the feeder waits for it
            feeder.join()
            for asked in window:
                asked.cancel()

    def _enter(self, row: Row, pool: ThreadPoolExecutor) -> _Asked:
        """Start on a row; waits while enough pictures are ahead."""
        asked = _Asked(dataclasses.replace(row, picture="") if row.embedded else row)
        if row.error is not None:
            return asked
        picture = self._recent.pop(row.picture, None)
        if picture is None:
            places = min(1 + len(row.picture) // PLACE_BYTES, PLACES) if row.embedded else 1
            for _ in range(places):
                self._places.get()
            picture = _Picture(pool.submit(self._prepare, row), places)
        self._recent[row.picture] = picture  # to the end of the line
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        self._to_feed.put((asked, picture))
        return asked

    def _prepare(self, row: Row) -> tuple[PreparedImage, float]:
        start = time.perf_counter()
        return self._engine.prepare_image(picture_of(row)), time.perf_counter() - start

    def _feed(self) -> None:
        """Encode pictures, several in a run if they are there, and put their questions into the running batch."""
        coming: deque[tuple[_Asked, _Picture]] = deque()
        while True:
            while not coming or not self._to_feed.empty():
                if (item := self._to_feed.get()) is None:
                    return
                coming.append(item)
            group = [coming.popleft()]
            wait([group[0][1].prepared])
            while coming and coming[0][1].prepared.done() and len({id(picture) for _, picture in group}) < TOGETHER:
                group.append(coming.popleft())
            if self._stopping:
                return
            failure = self._encode([picture for _, picture in group])
            for asked, picture in group:
                try:
                    asked.submitted.set_result(self._submit(asked.row, picture, failure))
                except Exception as error:  # noqa: BLE001 - the row's own, or the reader's to raise
                    asked.submitted.set_exception(error)

    def _encode(self, pictures: Iterable[_Picture]) -> Exception | None:
        """Run the vision encoder for pictures that are new; what keeps it from running belongs to all of them."""
        new = {id(picture): picture for picture in pictures if picture.places}
        good = [picture for picture in new.values() if picture.prepared.exception() is None]
        start = time.perf_counter()
        try:
            encoded = self._engine.encode_images([picture.prepared.result()[0] for picture in good])
            for picture, image in zip(good, encoded, strict=True):
                picture.encoded, picture.seconds = image, (picture.prepared.result()[1], time.perf_counter() - start)
        except Exception as error:  # noqa: BLE001 - as in _feed
            return error
        finally:
            for picture in new.values():
                for _ in range(picture.places):
                    self._places.put(None)
                picture.places = 0
        return None

    def _submit(self, row: Row, picture: _Picture, failure: Exception | None) -> tuple[Pending, tuple[float, float]]:
        if failure is not None:
            raise failure
        picture.prepared.result()  # raises what is wrong with it
        assert picture.encoded is not None
        options = self._options
        if options.seed is not None:
            options = dataclasses.replace(options, seed=options.seed + row.number)
        self._room.get()
        release = partial(self._room.put, None)
        try:
            if self._stopping:
                raise PgfastError("nobody waits for the answers any more")
            pending = self._engine.submit(
                picture.encoded,
                row.question,
                prompt=row.prompt,
                choices=row.choices,
                language=row.language,
                options=options,
                patient=True,
                on_progress=release,
            )
        except BaseException:
            release()
            raise
        seconds, picture.seconds = picture.seconds, (0.0, 0.0)
        return pending, seconds


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
