"""A picture as the user has it to `pixel_values`, as the SigLIP processor of transformers (PIL backend) does it.

Three things differ on purpose: EXIF orientation is applied, transparent parts become white instead of whatever colour is
stored under them, and more than 8 bits of gray are scaled instead of clipped.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pgfast.errors import ImageError
from pgfast.image_colors import upright_rgb
from pgfast.image_files import FORMATS, MAX_PIXELS, bounded, check_size, open_file, reason, say_frames
from pgfast.manifest import ImageSpec

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

__all__ = ["FORMATS", "MAX_PIXELS", "ImageInput", "normalize", "open_image", "squash", "to_pixel_values"]

ImageInput = Any
"""Path (str or os.PathLike), bytes, PIL.Image.Image, or uint8 array [H, W, 3], [H, W, 4] (RGBA) or [H, W] (gray)."""


def open_image(image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> PILImage:
    """Decode a picture to RGB, upright (EXIF orientation applied), transparency on white.

    Of a file with several frames or pages the first is used, and the log says so. Colour profiles are not looked at.

    Args:
        image: A path, the bytes of a file, a `PIL.Image.Image`, or a uint8 array: [H, W, 3], [H, W, 4] (RGBA), [H, W] (gray).
        max_pixels: Larger pictures are refused before they are decoded; `MAX_PIXELS` at most.

    Raises:
        ImageError: Missing, unreadable, truncated, too large, or of another type.
    """
    from PIL import Image

    most = min(max_pixels, MAX_PIXELS)
    if isinstance(image, np.ndarray):
        return _decoded(_from_array(image, most), "the picture")
    if isinstance(image, Image.Image):
        check_size(image.width, image.height, "the picture", most)
        return _decoded(image, "the picture")
    if isinstance(image, bytes | bytearray | memoryview):
        data = image.tobytes() if isinstance(image, memoryview) else image  # it may have gaps
        return _from_file(io.BytesIO(data), "the picture", most)
    if not isinstance(image, str | os.PathLike):
        raise ImageError(f"a picture is a path, bytes, a PIL image or a uint8 array, not {type(image).__name__}")
    what = os.fsdecode(image)
    try:
        with open(image, "rb") as file:
            return _from_file(file, what, most)
    except FileNotFoundError as error:
        if what.startswith(("http://", "https://")):
            raise ImageError(f"{what} is an address, not a file: download the picture first") from error
        raise ImageError(f"{what} does not exist") from error
    except IsADirectoryError as error:
        raise ImageError(f"{what} is a folder, not a picture") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{what} cannot be read: {reason(error)}") from error


def _from_file(file: Any, what: str, most: int) -> PILImage:
    file = bounded(file, what)
    opened = open_file(file, what, most)
    rgb = _decoded(opened, what)
    say_frames(opened, file, what)
    return rgb


def _decoded(image: PILImage, what: str) -> PILImage:
    try:
        return upright_rgb(image)
    except ImageError as error:
        raise ImageError(f"{what} cannot be used: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them raise
        raise ImageError(f"{what} is damaged: {reason(error)}") from error


def _from_array(array: NDArray[Any], most: int) -> PILImage:
    from PIL import Image

    is_gray = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or 0 in array.shape or not (is_gray or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"a picture array is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}{_how_to_convert(array)}")
    height, width = array.shape[:2]
    check_size(width, height, "the picture", most)
    return Image.fromarray(np.ascontiguousarray(array.reshape(height, width) if is_gray else array))


def _how_to_convert(array: NDArray[Any]) -> str:
    """Return the next step for what is often given instead."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        return ": array.transpose(1, 2, 0) puts the channels last"
    if array.ndim == 4 and array.shape[0] == 1:
        return ": array[0] is the one picture in it"
    if array.dtype.kind == "f":
        return ": if the values are in 0..1, (array * 255).round().astype(numpy.uint8)"
    if array.dtype == np.bool_:
        return ": array.astype(numpy.uint8) * 255"
    if array.dtype == np.uint16:
        return ": if the values use all 16 bits, (array >> 8).astype(numpy.uint8)"
    return ""


def to_pixel_values(image: PILImage, spec: ImageSpec) -> NDArray[np.float32]:
    """Squash to a square, scale and normalise.

    Args:
        image: RGB.
        spec: Size, resampling, mean and std from the manifest.

    Returns:
        float32 [1, 3, R, R].
    """
    # resizing on uint8, then scaling, in this order (transformers, image_processing_pil_siglip.py)
    return normalize(squash(image, spec)[None], spec)


def squash(image: PILImage, spec: ImageSpec) -> NDArray[np.uint8]:
    """Resize to the model's square, uint8 [R, R, 3]."""
    from PIL import Image

    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[spec.resampling]
    return np.asarray(image.resize((spec.size, spec.size), resample))


def normalize(images: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Scale and normalise: uint8 [N, R, R, 3] to float32 [N, 3, R, R]."""
    mean, std, factor = (np.array(value, dtype=np.float32) for value in (spec.mean, spec.std, spec.rescale_factor))
    pixels: NDArray[np.float32] = (images.astype(np.float32) * factor - mean) / std  # [N, R, R, 3]
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
