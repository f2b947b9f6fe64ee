"""Pictures of a run: opened, squashed to the model's square, kept in memory while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pgfast.image import open_image, squash
from pgfast.manifest import ImageSpec

from .data.records import Dataset

KEPT_BYTES = 256 << 20
"""Room for squashed pictures: all of easy-VQA; of 224-pixel ones the last 1,700."""

Augment = Callable[[NDArray[np.uint8], Sequence[str], np.random.Generator], NDArray[np.uint8]]
"""Changes pictures [N, R, R, 3], whose names it is told, in a way that keeps every answer true."""


def broken_picture(dataset: Dataset, row: int, error: Exception) -> str:
    """Say which row's picture cannot be read, and what to do."""
    return f"{dataset.name}, row {row} (question {dataset.record(row).id}): {error}; --skip-bad goes on without such rows"


class Pictures:
    """Squashed pictures by row, from any number of threads.

    Args:
        dataset: Where they come from.
        spec: How the base model wants them.
    """

    def __init__(self, dataset: Dataset, spec: ImageSpec) -> None:
        self._dataset, self.spec = dataset, spec
        self._kept: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._most = max(1, KEPT_BYTES // (spec.size * spec.size * 3))
        self._lock = threading.Lock()

    def squashed(self, row: int) -> NDArray[np.uint8]:
        """Return uint8 [R, R, 3].

        Raises:
            ImageError: The picture cannot be read.
        """
        name = self._dataset.record(row).picture
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        picture = squash(open_image(self._dataset.image(row)), self.spec)
        with self._lock:
            self._kept[name] = picture
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return picture
