"""A picture as the user has it to `pixel_values`, as the SigLIP processor of transformers (PIL backend) does it.

Two things differ on purpose: EXIF orientation is applied, and transparent parts become white instead of whatever colour is
stored under them.
"""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pgfast.errors import ImageError
from pgfast.manifest import ImageSpec

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

MAX_PIXELS = 80_000_000
"""Larger pictures are refused before they are decoded; under Pillow's own limit of 89 million."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that decode in-process; Pillow would hand some others (EPS) to an external program."""
MAX_SCANS = 100
"""Of a progressive JPEG, which has about ten. Each costs a pass over the whole picture and perhaps less than 100 bytes;
libtiff has the same limit."""
BAND = 128
"""Rows of a transparent picture that are put on white at a time."""

_OPENING = threading.Lock()
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
"""The next marker with a length in JPEG's data; elsewhere 0xFF stands only before zeros and markers that have none."""

ImageInput = Any
"""Path (str or os.PathLike), bytes, PIL.Image.Image, or uint8 array [H, W, 3]."""


def open_image(image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> PILImage:
    """Decode a picture to RGB, upright (EXIF orientation applied), transparency on white.

    Args:
        image: A path, the bytes of a file, a `PIL.Image.Image`, or a uint8 array [H, W, 3].
        max_pixels: Larger pictures are refused before they are decoded; `MAX_PIXELS` at most.

    Raises:
        ImageError: Missing, unreadable, truncated, too large, or of another type.
    """
    from PIL import Image

    most = min(max_pixels, MAX_PIXELS)
    if isinstance(image, np.ndarray):
        return _upright_rgb(Image.fromarray(_check_array(image)), "the picture", most)
    if isinstance(image, Image.Image):
        return _upright_rgb(image, "the picture", most)
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(image), "the picture", most)
    if not isinstance(image, str | os.PathLike):
        raise ImageError(f"a picture is a path, bytes, a PIL image or a uint8 array, not {type(image).__name__}")
    what = os.fspath(image)
    try:
        with open(image, "rb") as file:
            return _decode(file, what, most)
    except FileNotFoundError as error:
        raise ImageError(f"{what} does not exist") from error
    except IsADirectoryError as error:
        raise ImageError(f"{what} is a folder, not a picture") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{what} cannot be read: {_reason(error)}") from error


def _decode(file: Any, what: str, most: int) -> PILImage:
    from PIL import Image, UnidentifiedImageError

    try:
        with _OPENING, warnings.catch_warnings():  # the filters are global: one thread at a time
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS refuses it in our words
            opened = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} is a decompression bomb: at most {most:,} pixels are accepted") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{what} is not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF)") from error
    except Exception as error:
        raise ImageError(f"{what} cannot be opened: {_reason(error)}") from error
    if opened.format in ("JPEG", "MPO") and opened.info.get("progressive") and opened.width * opened.height <= most:
        file.seek(0)
        if _scans(file.read()) > MAX_SCANS:
            raise ImageError(f"{what} has more than {MAX_SCANS} scans: save it again as a usual JPEG")
    return _upright_rgb(opened, what, most)


def _scans(jpeg: bytes) -> int:
    """Count a JPEG's scans, up to one more than are accepted."""
    count, place = 0, 2
    while count <= MAX_SCANS and (match := _MARKER.search(jpeg, place)) and match[1] != b"\xd9":
        count += match[1] == b"\xda"
        place = match.end() + int.from_bytes(jpeg[match.end() : match.end() + 2])
    return count


def _upright_rgb(image: PILImage, what: str, most: int) -> PILImage:
    from PIL import ImageOps

    if image.width * image.height > most:
        raise ImageError(f"{what} has {image.width} x {image.height} pixels: at most {most:,} are accepted")
    try:
        # the order matters: orientation is in the metadata that a conversion drops
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them raise
        raise ImageError(f"{what} is damaged: {_reason(error)}") from error


def _to_rgb(image: PILImage) -> PILImage:
    from PIL import Image

    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # more than 8 bits of gray: Pillow would clip, not scale
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 0xFFFF:
            raise ImageError("more than 16 bits per pixel: convert the picture to 8 bits")
        image = Image.fromarray((gray.astype(np.uint16) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range: convert the picture to 8 bits")
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: PILImage) -> PILImage:
    # in bands: Pillow lets no other thread run meanwhile, and whole pictures would be in memory three times more
    from PIL import Image

    result = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):
        band = image.crop((0, top, image.width, min(top + BAND, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result


def _check_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(f"a picture array is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array)


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


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
