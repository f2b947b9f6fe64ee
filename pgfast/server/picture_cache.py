"""Encoded pictures by the bytes of their files: what comes again, or is on its way already, is not encoded again."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor
from dataclasses import dataclass, field
from functools import partial

from pgfast.types import EncodedImage

from .bodies import off_loop
from .metrics import Metrics

Encoded = tuple[EncodedImage, tuple[float, float]]
"""A picture, and the seconds of preprocessing and of the vision encoder that were spent on it for this request."""
OVERHEAD = 1024
"""Bytes of an entry besides its features."""


@dataclass(slots=True, eq=False)
class _Encoding:
    """A picture that is being encoded."""

    picture: bytes | None
    future: asyncio.Future[Encoded] = field(init=False)
    waiting: int = 0

    def take(self) -> bytes:
        """The picture's bytes; in a thread."""
        if (picture := self.picture) is None:
            raise CancelledError
        return picture


class PictureCache:
    """Used from the event loop; the encoding itself runs in threads.

    Args:
        encode: Given how to get the bytes of a file, makes an encoded picture; asks for them when it can use them, for who
            wanted it may be gone by then, which raises `concurrent.futures.CancelledError`.
        pool: Where it runs.
        limit: Bytes of features that are kept; what was used longest ago goes first. 0: nothing is kept.
        metrics: Counts hits and misses.
    """

    def __init__(self, encode: Callable[[Callable[[], bytes]], Encoded], pool: Executor, limit: int, metrics: Metrics) -> None:
        self._encode, self._pool, self._limit, self._metrics = encode, pool, limit, metrics
        self._kept: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._running: dict[bytes, _Encoding] = {}
        self._bytes = 0
        metrics.cache_bytes.set_function(lambda: self._bytes)

    async def get(self, picture: bytes) -> Encoded:
        """Return a picture encoded.

        Raises:
            ImageError: It cannot be decoded.
        """
        key = await off_loop(len(picture), _hash, picture)
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            self._metrics.cache_hits.inc()
            return kept, (0.0, 0.0)
        encoding = self._running.get(key)
        if encoding is not None:
            self._metrics.cache_hits.inc()
            return (await self._wait(key, encoding))[0], (0.0, 0.0)
        self._metrics.cache_misses.inc()
        encoding = _Encoding(picture)
        encoding.future = asyncio.get_running_loop().run_in_executor(self._pool, self._encode, encoding.take)
        encoding.future.add_done_callback(partial(self._finish, key, encoding))
        self._running[key] = encoding
        return await self._wait(key, encoding)

    async def _wait(self, key: bytes, encoding: _Encoding) -> Encoded:
        encoding.waiting += 1
        try:
            # who gives up must not take the picture away from the others
            return await asyncio.shield(encoding.future)
        finally:
            encoding.waiting -= 1
            if not encoding.waiting and not encoding.future.done():
                encoding.future.cancel()  # once it is being decoded it cannot be stopped: its result is thrown away
                encoding.picture = None  # the queue keeps what was cancelled, and no limit of bodies counts it any more
                del self._running[key]

    def _finish(self, key: bytes, encoding: _Encoding, future: asyncio.Future[Encoded]) -> None:
        if self._running.get(key) is encoding:
            del self._running[key]
        if not future.cancelled() and future.exception() is None:
            self._keep(key, future.result()[0])

    def _keep(self, key: bytes, image: EncodedImage) -> None:
        if key in self._kept:  # encoded twice, because somebody had given up
            self._bytes -= _size(self._kept.pop(key))
        self._kept[key] = image
        self._bytes += _size(image)
        while self._bytes > self._limit:
            self._bytes -= _size(self._kept.popitem(last=False)[1])


def _size(image: EncodedImage) -> int:
    return image.image_features.nbytes + OVERHEAD


def _hash(picture: bytes) -> bytes:
    return hashlib.blake2b(picture, digest_size=16).digest()
