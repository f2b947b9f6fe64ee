"""Pictures to image features: what callers give, through preprocessing and the vision encoder."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pgfast.errors import InputError, PgfastError
from pgfast.image import MAX_PIXELS, ImageInput, normalize, open_image, squash
from pgfast.manifest import Manifest
from pgfast.runtime.buffers import DeviceFeatures
from pgfast.runtime.model import Model
from pgfast.types import EncodedImage, PreparedImage

RECENT = 16
"""Pictures of a batch that are kept in case they come again."""


class PictureEncoder:
    """Encodes pictures for one bundle, in the thread of the caller.

    Args:
        manifest: How pictures are prepared, and what marks features as this bundle's.
        model: Has the vision encoder.
    """

    def __init__(self, manifest: Manifest, model: Model) -> None:
        self._manifest, self._model = manifest, model
        self._process = os.getpid()
        # tells encoded images of this vision encoder from those of another
        names = (manifest.graphs["vision_encoder"].file, f"{manifest.graphs['vision_encoder'].file}.data")
        hashes = (manifest.files[name].sha256 for name in names if name in manifest.files)
        self._bundle_id = "-".join([*hashes, str(manifest.image)])

    def prepare(self, image: ImageInput, max_pixels: int = MAX_PIXELS) -> PreparedImage:
        """Decode and resize a picture.

        Args:
            image: What a caller gave; a `PreparedImage` is checked and stays what it is.
            max_pixels: As in `open_image`.

        Raises:
            ImageError: The picture cannot be used.
            InputError: A `PreparedImage` is for another bundle.
        """
        spec = self._manifest.image
        if isinstance(image, PreparedImage):
            if image.spec != spec or image.pixels.shape != (spec.size, spec.size, 3) or image.pixels.dtype != np.uint8:
                raise InputError("this PreparedImage was made for another bundle: prepare the picture again")
            return image
        opened = open_image(image, max_pixels=max_pixels)
        return PreparedImage(squash(opened, spec), opened.width, opened.height, spec)

    def encode(
        self, images: Sequence[ImageInput | EncodedImage], recent: dict[int, EncodedImage] | None = None
    ) -> tuple[list[EncodedImage], tuple[float, float]]:
        """Encode pictures in few runs; also returns the seconds of preprocessing and of the vision encoder.

        Args:
            images: What callers gave, each for a prompt; a list holds several pictures for one prompt. An `EncodedImage` is
                checked and stays what it is.
            recent: Those of before by `id`, not to be encoded again; brought up to date, `RECENT` at most.

        Raises:
            InputError: A picture cannot be used, or an `EncodedImage` is another bundle's.
            PgfastError: The process was forked after the engine was loaded.
        """
        if os.getpid() != self._process:  # threads do not survive a fork: nobody would answer
            raise PgfastError(
                "the engine was loaded before this process was forked: load it here, or start processes with spawn"
            )
        start = time.perf_counter()
        recent = {} if recent is None else recent
        known = {id(image): recent.get(id(image), image) for image in images}
        parts = {key: self._parts(image) for key, image in known.items()}
        new = [part for group in parts.values() for part in group if isinstance(part, PreparedImage)]
        preprocess = vision = 0.0
        encoded_new: Iterator[EncodedImage] = iter(())
        if new:
            pixels = normalize(np.stack([picture.pixels for picture in new]), self._manifest.image)  # [B, 3, R, R]
            prepared = time.perf_counter()
            encoded_new = iter(self._run(new, pixels))
            preprocess, vision = prepared - start, time.perf_counter() - prepared
        found = {
            key: _joined([next(encoded_new) if isinstance(part, PreparedImage) else part for part in group])
            for key, group in parts.items()
        }
        for key, encoded in found.items():  # to the end of the line
            recent.pop(key, None)
            recent[key] = encoded
        for key in list(recent)[:-RECENT]:
            del recent[key]
        return [found[id(image)] for image in images], (preprocess, vision)

    def _parts(self, image: ImageInput | EncodedImage) -> list[PreparedImage | EncodedImage]:
        """Return the pictures of one prompt, opened, and those that are encoded already."""
        given = list(image) if isinstance(image, list | tuple) else [image]
        parts = [part if isinstance(part, EncodedImage) else None for part in given]
        size, most = self._manifest.dimensions.num_image_tokens, self._manifest.limits.images
        count = sum(part.image_features.shape[1] // size if part is not None and self._own(part) else 1 for part in parts)
        if not 1 <= count <= most:
            raise InputError(f"{count} pictures for one prompt: this bundle takes 1 to {most} (pgfast export --max-images)")
        return [self.prepare(picture) if part is None else part for picture, part in zip(given, parts, strict=True)]

    def _run(self, pictures: Sequence[PreparedImage], pixels: NDArray[np.float32]) -> list[EncodedImage]:
        """Encode pictures, as many at a time as may share a run; pixels [B, 3, R, R]."""
        most = self._model.together
        # one picture may still be on the device, an array to all who look: it has a shape, and numpy reads it
        runs = [self._model.encode(pixels[first : first + most]) for first in range(0, len(pixels), most)]
        features = (
            [runs[0]] if len(pictures) == 1 else [np.asarray(run)[i : i + 1] for run in runs for i in range(run.shape[0])]
        )
        return [
            EncodedImage(cast("NDArray[Any]", own), picture.width, picture.height, self._bundle_id)
            for own, picture in zip(features, pictures, strict=True)
        ]

    def _own(self, image: EncodedImage) -> bool:
        if image.bundle_id != self._bundle_id:
            raise InputError("this EncodedImage was made with another bundle: encode the picture again")
        d = self._manifest.dimensions
        features: Any = image.image_features
        # all that could make the run fail, for others share it
        numbers = isinstance(features, DeviceFeatures) or (isinstance(features, np.ndarray) and features.dtype.kind == "f")
        size, most = d.num_image_tokens, self._manifest.limits.images
        if not numbers or features.shape not in [(1, count * size, d.hidden_size) for count in range(1, most + 1)]:
            raise InputError(f"image_features must be [1, {size}, {d.hidden_size}]: encode the picture again")
        return True


def _joined(parts: list[EncodedImage]) -> EncodedImage:
    """Make the pictures of a prompt one: their image tokens follow each other, as in transformers' processor."""
    if len(parts) == 1:
        return parts[0]
    features = np.concatenate([np.asarray(part.image_features) for part in parts], axis=1)  # [1, n * P, D]
    return dataclasses.replace(parts[0], image_features=features)
