"""Weights of several graphs, once in device memory: their sessions get them instead of reading the data file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from pgfast.errors import BundleError

from .buffers import to_device
from .providers import Target, import_onnxruntime

_PLACE = re.compile(r"(float32|float16|bfloat16|uint8)\[(\d+(?:, \d+)*)\]@(\d+)")


class SharedWeights:
    """The initializers of a data file in device memory; it must outlive the sessions that use them.

    Args:
        path: The data file.
        places: `type[dims]@offset` by initializer, as the manifest has them.
        target: Whose memory.

    Raises:
        BundleError: A place makes no sense or is not in the file.
    """

    def __init__(self, path: Path, places: dict[str, str], target: Target) -> None:
        ort_value = import_onnxruntime().OrtValue
        self._owners = [_read(path, name, place, target) for name, place in places.items()]
        # a session takes only memory that it does not own; passed through dlpack the same memory counts as such
        self.initializers = dict(zip(places, map(ort_value.from_dlpack, self._owners), strict=True))


def _read(path: Path, name: str, place: str, target: Target) -> Any:
    match = _PLACE.fullmatch(place)
    if match is None:
        raise BundleError(f"{path.name}: {place!r} is no place of {name}")
    try:
        shape = tuple(map(int, match[2].split(", ")))
        dtype = np.dtype(np.uint16 if match[1] == "bfloat16" else match[1])
        array = np.memmap(path, dtype, "r", int(match[3]), shape)
    except (OSError, ValueError, OverflowError) as error:
        raise BundleError(f"{path.name} does not hold {name}: {error}") from error
    return to_device(target, array, bfloat16=match[1] == "bfloat16")
