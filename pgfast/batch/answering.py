"""Rows to results, in order: pictures are decoded ahead in threads, and the engine's running batch is kept full."""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING

from pgfast.engine import ENCODED_AHEAD
from pgfast.errors import InputError, PgfastError
from pgfast.pictures import RECENT
from pgfast.runtime.model import TOGETHER
from pgfast.types import EncodedImage, GenerateOptions, PreparedImage

from .rows import Failure, Result, Row, picture_of

if TYPE_CHECKING:
    from pgfast.engine import Engine
    from pgfast.pending import Pending

WINDOW = 1024
"""Rows between the one that is read and the one whose result comes next: a long answer holds up no others."""
PLACES = 32
"""Pictures that are read and decoded ahead of the vision encoder; one inside its row takes a place for each `PLACE_BYTES`."""
PLACE_BYTES = 8 * 2**20
SECONDS_BETWEEN_LOOKS = 0.1
"""While no further row may be read, for results that are there."""


def answer_rows(
    engine: Engine, rows: Iterable[Row], *, options: GenerateOptions | None = None, threads: int | None = None
) -> Generator[Result]:
    """Answer rows; each gets exactly one result, in the order given, and what is wrong with one stays with it.

    Rows are taken a bounded number ahead of the results. Leaving the iterator early cancels what is under way.

    Args:
        engine: A loaded bundle, without `max_waiting`.
        rows: Read lazily, in the thread that asks for results.
        options: How to decode. With a seed, each row adds its number to it, so that equal rows draw differently.
        threads: How many decode pictures; None: one per two cores, from 2 to 16.

    Raises:
        PgfastError: The engine cannot go on; no row is to blame.
    """
    threads = threads or min(max((os.cpu_count() or 1) // 2, 2), 16)
    return _Answering(engine, options or GenerateOptions()).results(rows, threads)


class _Picture:
    """A picture of one or several rows near each other."""

    def __init__(self, places: int) -> None:
        self.places = places
        """Those of `PLACES` that it takes until it is encoded."""
        self.prepared: Future[tuple[PreparedImage, float]] = Future()
        """With the seconds that it took."""
        self.encoded: EncodedImage | None = None
        self.seconds = (0.0, 0.0)
        """What preparing and the vision encoder took; for the first row that asks about it."""


class _Asked:
    """A row on its way; without its picture, for there are many of them."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self._outcome: tuple[Pending, tuple[float, float]] | Exception | None = None
        self._known = queue.SimpleQueue[None]()

    def submitted(self, outcome: tuple[Pending, tuple[float, float]] | Exception) -> None:
        """Take what the engine works on with the seconds of its picture, or why it does not."""
        self._outcome = outcome
        self._known.put(None)

    @property
    def done(self) -> bool:
        """Whether `result` has something to return or to raise at once."""
        if self.row.error is not None or isinstance(self._outcome, Exception):
            return True
        return self._outcome is not None and self._outcome[0].done

    def result(self) -> Result:
        if self.row.error is not None:
            return Result(self.row, error=self.row.error)
        self._known.get()
        assert self._outcome is not None
        try:
            if isinstance(self._outcome, Exception):
                raise self._outcome
            pending, (preprocess, vision) = self._outcome
            answer = pending.result()
        except InputError as error:
            return Result(self.row, error=Failure.of(error))
        timings = dataclasses.replace(answer.timings, preprocess=answer.timings.preprocess + preprocess, vision=vision)
        return Result(self.row, dataclasses.replace(answer, timings=timings))

    def cancel(self) -> None:
        if isinstance(self._outcome, tuple):
            self._outcome[0].cancel()


class _Answering:
    """One run of `answer_rows`: the caller's thread reads rows and yields results, others decode, one feeds the engine.

    The caller's thread, which Ctrl-C may interrupt anywhere, shares only queues with the others: no lock can stay locked.
    """

    def __init__(self, engine: Engine, options: GenerateOptions) -> None:
        self._engine, self._options = engine, options
        self._recent: OrderedDict[str, _Picture] = OrderedDict()
        self._to_decode = queue.SimpleQueue[tuple[Row, _Picture] | None]()
        self._to_feed = queue.SimpleQueue[tuple[_Asked, _Picture] | None]()
        self._stopping = False
        self._freed = 0
        """Places to be given back; the feeder's."""
        self._places, self._room = queue.SimpleQueue[None](), queue.SimpleQueue[None]()
        for _ in range(PLACES):
            self._places.put(None)
        for _ in range(engine.load_figures().slots + ENCODED_AHEAD):
            self._room.put(None)

    def results(self, rows: Iterable[Row], threads: int) -> Generator[Result]:
        window: deque[_Asked] = deque()
        workers = [threading.Thread(target=self._decode, name="pgfast-decode", daemon=True) for _ in range(threads)]
        workers.append(threading.Thread(target=self._feed, name="pgfast-feed", daemon=True))
        try:
            for worker in workers:
                worker.start()
            for row in rows:
                picture = self._find(row)
                needed = places = _places_of(row) if picture is None else 0
                while needed:
                    needed -= self._take_place()
                    while window and window[0].done:
                        yield window.popleft().result()
                window.append(self._enter(row, picture, places))
                while window and (len(window) >= WINDOW or window[0].done):
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            self._stopping = True
            for _ in range(threads):
                self._to_decode.put(None)
            self._to_feed.put(None)
            self._room.put(None)  # in case the feeder waits for it
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            for asked in window:
                asked.cancel()

    def _find(self, row: Row) -> _Picture | None:
        """Return the picture of a row if one of the rows just before asks about it too."""
        picture = self._recent.pop(row.picture, None)
        if picture is not None:
            self._recent[row.picture] = picture  # to the end of the line
        return picture

    def _take_place(self) -> bool:
        try:
            self._places.get(timeout=SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            return False
        return True

    def _enter(self, row: Row, picture: _Picture | None, places: int) -> _Asked:
        """Start on a row whose picture is known or has its places."""
        asked = _Asked(dataclasses.replace(row, picture="") if row.embedded else row)
        if row.error is not None:
            return asked
        if picture is None:
            picture = _Picture(places)
            self._to_decode.put((row, picture))
            if places == 1:  # the keys are the pictures themselves when they are inside rows
                self._recent[row.picture] = picture
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        self._to_feed.put((asked, picture))
        return asked

    def _decode(self) -> None:
        while (item := self._to_decode.get()) is not None:
            row, picture = item
            start = time.perf_counter()
            try:
                if self._stopping:
                    raise _unwanted()
                picture.prepared.set_result((self._engine.prepare_image(picture_of(row)), time.perf_counter() - start))
            except Exception as error:  # noqa: BLE001 - the row's own, or the reader's to raise
                picture.prepared.set_exception(error)

    def _feed(self) -> None:
        """Encode pictures, several in a run if they are there, and put their questions into the running batch."""
        coming: deque[tuple[_Asked, _Picture]] = deque()
        while True:
            while not coming or not self._to_feed.empty():
                if self._to_feed.empty():
                    self._free(0)
                if (item := self._to_feed.get()) is None:
                    return
                coming.append(item)
            group = [coming.popleft()]
            if not group[0][1].prepared.done():
                self._free(0)
                wait([group[0][1].prepared])
            while coming and coming[0][1].prepared.done() and len({id(picture) for _, picture in group}) < TOGETHER:
                group.append(coming.popleft())
            if self._stopping:
                return
            failure = self._encode([picture for _, picture in group])
            for asked, picture in group:
                try:
                    asked.submitted(self._submit(asked.row, picture, failure))
                except Exception as error:  # noqa: BLE001 - as in _decode
                    asked.submitted(error)

    def _encode(self, pictures: Iterable[_Picture]) -> Exception | None:
        """Run the vision encoder for pictures that are new; what keeps it from running belongs to all of them."""
        new = {id(picture): picture for picture in pictures if picture.places}
        good = [picture for picture in new.values() if picture.prepared.exception() is None]
        start = time.perf_counter()
        try:
            encoded = self._engine.encode_images([picture.prepared.result()[0] for picture in good])
            for picture, image in zip(good, encoded, strict=True):
                picture.encoded, picture.seconds = image, (picture.prepared.result()[1], time.perf_counter() - start)
        except Exception as error:  # noqa: BLE001 - as in _decode
            return error
        finally:
            for picture in new.values():
                self._freed += picture.places
                picture.places = 0
            self._free(PLACES // 2)
        return None

    def _free(self, least: int) -> None:
        """Give places back, many at once: each time the reader and the decoders wake up and take the interpreter's lock."""
        if self._freed >= least:
            for _ in range(self._freed):
                self._places.put(None)
            self._freed = 0

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
                raise _unwanted()
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


def _places_of(row: Row) -> int:
    """How many of `PLACES` a row's picture takes."""
    if row.error is not None:
        return 0
    return min(1 + len(row.picture) // PLACE_BYTES, PLACES) if row.embedded else 1


def _unwanted() -> PgfastError:
    return PgfastError("nobody waits for the answer any more")
