"""Pictures to image features: what callers give, through preprocessing and the vision encoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pgfast.errors import InputError
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
        """Encode pictures in one run; also returns the seconds of preprocessing and of the vision encoder.

        Args:
            images: What callers gave; an `EncodedImage` is checked and stays what it is.
            recent: Those of before by `id`, not to be encoded again; brought up to date, `RECENT` at most.

        Raises:
            InputError: A picture cannot be used, or an `EncodedImage` is another bundle's.
        """
        start = time.perf_counter()
        recent = {} if recent is None else recent
        known = {id(image): recent.get(id(image), image) for image in images}
        found = {key: image for key, image in known.items() if isinstance(image, EncodedImage) and self._own(image)}
        opened = {key: self.prepare(image) for key, image in known.items() if not isinstance(image, EncodedImage)}
        preprocess = vision = 0.0
        if opened:
            pixels = normalize(np.stack([picture.pixels for picture in opened.values()]), self._manifest.image)  # [B, 3, R, R]
            prepared = time.perf_counter()
            features = self._model.encode(pixels)  # [B, P, D]
            preprocess, vision = prepared - start, time.perf_counter() - prepared
            for i, (key, picture) in enumerate(opened.items()):
                # one picture may still be on the device, an array to all who look: it has a shape, and numpy reads it
                own = cast("NDArray[Any]", features) if len(opened) == 1 else np.asarray(features)[i : i + 1]
                found[key] = EncodedImage(own, picture.width, picture.height, self._bundle_id)
        for key, encoded in found.items():  # to the end of the line
            recent.pop(key, None)
            recent[key] = encoded
        for key in list(recent)[:-RECENT]:
            del recent[key]
        return [found[id(image)] for image in images], (preprocess, vision)

    def _own(self, image: EncodedImage) -> bool:
        if image.bundle_id != self._bundle_id:
            raise InputError("this EncodedImage was made with another bundle: encode the picture again")
        d = self._manifest.dimensions
        features: Any = image.image_features
        # all that could make the run fail, for others share it
        numbers = isinstance(features, DeviceFeatures) or (isinstance(features, np.ndarray) and features.dtype.kind == "f")
        if not numbers or features.shape != (1, d.num_image_tokens, d.hidden_size):
            raise InputError(f"image_features must be [1, {d.num_image_tokens}, {d.hidden_size}]: encode the picture again")
        return True
