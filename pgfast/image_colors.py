"""From any of Pillow's modes to RGB, upright: 16 bits become 8, transparent parts white. Colour profiles are not looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pgfast.errors import ImageError
from pgfast.image_files import quiet

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

BAND = 128
"""Rows of a transparent picture that are put on white at a time."""
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262
"""Tags of EXIF and TIFF."""


def upright_rgb(image: PILImage) -> PILImage:
    """Decode a picture to RGB, with EXIF's orientation applied and transparent parts white.

    Raises:
        ImageError: Its pixels have no known range.
        Exception: What Pillow's decoders raise about a broken file.
    """
    from PIL import Image

    _mend_transparent_value(image)
    image.load()
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: PILImage) -> Any:
    """EXIF's orientation; damaged metadata is no reason to refuse the pixels."""
    with quiet():
        try:
            return image.getexif().get(ORIENTATION, 1)
        except Exception:  # noqa: BLE001
            return 1


def _mend_transparent_value(image: PILImage) -> None:
    """Bring the colour that PNG's tRNS names from the file's depth to the 8 bits of the pixels; Pillow leaves it."""
    value = image.info.get("transparency")
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None
    depth = tiles[0][3] if tiles else None
    if isinstance(value, int) and depth in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if depth == "L;2" else 17)
    elif isinstance(value, tuple) and depth == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _to_rgb(image: PILImage) -> PILImage:
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range: convert the picture to 8 bits")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in ("RGBa", "La"):  # alpha multiplied in
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: PILImage) -> PILImage:
    """Keep the upper 8 of 16 bits of gray, as Pillow does with 16 bits of colour; with gray it would clip."""
    from PIL import Image

    gray = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and (tags or gray.min() < 0 or gray.max() > 0xFFFF):
        raise ImageError("pixels of 32 bits, or with a sign, have no known range: convert the picture to 8 bits")
    upper = (gray >> (4 if tags.get(BITS_PER_SAMPLE) == (12,) else 8)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # white is 0
        upper = 255 - upper
    eight = Image.fromarray(upper)
    if isinstance(value := image.info.get("transparency"), int):
        eight.putalpha(Image.fromarray(np.where(gray == value, 0, 255).astype(np.uint8)))
    return eight


def _on_white(image: PILImage) -> PILImage:
    # in bands: Pillow lets no other thread run meanwhile, and whole pictures would be in memory three times more
    from PIL import Image

    result = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):
        band = image.crop((0, top, image.width, min(top + BAND, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result
