"""Bytes of a picture: an `ImageError`, or a picture within the limits that becomes finite numbers.

Pillow's decoders are C and not instrumented: coverage guides through Pillow's parsers in Python and through pgfast's own code.
"""

from __future__ import annotations

import logging

if __name__ == "__main__":
    import atheris  # noqa: F401 - `instrumented` looks for it

from fuzz.target import fuzz, instrumented, one_line

with instrumented():
    import numpy as np
    from PIL import (  # noqa: F401 - imported here to be instrumented
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        Image,
        JpegImagePlugin,
        PngImagePlugin,
        PpmImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    from pgfast.errors import ImageError
    from pgfast.image import open_image, to_pixel_values
    from pgfast.manifest import ImageSpec

MAX_PIXELS = 1_000_000
"""Time goes into many pictures, not into large ones."""
SPEC = ImageSpec(32, [0.5] * 3, [0.5] * 3, 1 / 255, "bicubic")


def check(data: bytes) -> None:
    """Open a picture."""
    try:
        image = open_image(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        one_line(error)
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MAX_PIXELS
    pixels = to_pixel_values(image, SPEC)
    assert pixels.shape == (1, 3, 32, 32)
    assert np.abs(pixels).max() <= 1


if __name__ == "__main__":
    logging.getLogger("pgfast").setLevel(logging.ERROR)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    fuzz(check)
