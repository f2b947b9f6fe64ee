"""Damaged pictures, pictures that are bombs, and damaged multipart bodies that carry them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from random import Random

from PIL import Image

from ..questions import json_body, picture, png, png_chunk
from .shot import Kind, Shot, post

BOUNDARY = b"xXx"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY.decode()}"
BOMB = 100 * 2**20
"""Bytes that a bomb of a few hundred kilobytes unpacks to."""


@lru_cache
def _zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


@lru_cache
def _file(format: str, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (64, 48), 7 if mode in ("L", "P", "1") else None).save(out, format)
    return out.getvalue()


@lru_cache
def _frames(format: str, number: int) -> bytes:
    """An animation."""
    out = io.BytesIO()
    images = [Image.new("P", (32, 32), i % 256) for i in range(number)]
    images[0].save(out, format, save_all=True, append_images=images[1:])
    return out.getvalue()


def _tiff(width: int, height: int, *, again: bool = False, offset: int = 200) -> bytes:
    """A TIFF of one byte of data that claims a size; `again`: its directory is followed by itself."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, offset)]
    tags += [(277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, min(width * height, 2**32 - 1))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\x00\x08\x00\x00\x00" + directory + struct.pack("<I", 8 if again else 0) + b"\x00" * 100


def _jpeg(width: int, height: int) -> bytes:
    """A JPEG whose frame header claims a size."""
    file = bytearray(_file("JPEG"))
    at = file.find(b"\xff\xc0")
    file[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(file)


BOMBS: tuple[Callable[[], bytes], ...] = (
    lambda: png(65535, 65535, _zeros(1000)),
    lambda: png(2**31 - 1, 2**31 - 1, _zeros(1000)),
    lambda: png(2**32 - 1, 1, _zeros(1000)),
    lambda: png(0, 0, b""),
    lambda: png(28_000, 28_000, _zeros(28_000 * 3501), depth=1, colour=0),  # honest: 784 megapixels in 100 KB
    lambda: png(64, 64, _zeros(BOMB)),  # far more data than it has pixels
    lambda: png(64, 64, _zeros(64 * 193), extra=png_chunk(b"iCCP", b"a\x00\x00" + _zeros(BOMB))),
    lambda: png(64, 64, _zeros(64 * 193), extra=png_chunk(b"zTXt", b"a\x00\x00" + _zeros(BOMB))),
    lambda: png(64, 64, _zeros(64 * 193), extra=png_chunk(b"iTXt", b"a\x00\x01\x00\x00\x00" + _zeros(BOMB))),
    lambda: png(64, 64, _zeros(64 * 193), extra=b"".join(png_chunk(b"tEXt", b"k%d\x00v" % i) for i in range(20_000))),
    lambda: (
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
    ),
    lambda: _frames("GIF", 2000),
    lambda: _tiff(2**31, 2**31),
    lambda: _tiff(65535, 65535),
    lambda: _tiff(64, 64, again=True),
    lambda: _tiff(64, 64, offset=2**32 - 1),
    lambda: _jpeg(65535, 65535),
    lambda: _jpeg(65500, 1),
    lambda: _file("BMP")[:18] + struct.pack("<ii", 2**31 - 1, -(2**31)) + _file("BMP")[26:],
    lambda: _file("BMP")[:18] + struct.pack("<ii", 30_000, 30_000) + _file("BMP")[26:],
    lambda: _file("WEBP")[:26] + b"\xff\x3f\xff\x3f" + _file("WEBP")[30:],
    lambda: b"P6 99999 99999 255\n" + bytes(100),
    lambda: b"P6 " + b"9" * 5000 + b" 1 255\n",
    lambda: b"\x00\x00\x01\x00\xff\xff" + bytes(16) * 1000,
    lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n%%EndComments\n(x) run\n",
    lambda: b"%PDF-1.4\n",
    lambda: b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(100),
    lambda: b"",
)
FORMATS = (
    *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "I;16")),
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("TIFF", mode) for mode in ("RGB", "F", "I;16", "CMYK", "LAB")),
    *((name, "RGB") for name in ("GIF", "BMP", "WEBP", "PPM", "TGA", "ICO", "PCX", "SGI", "JPEG2000", "AVIF")),
)


def multipart(parts: list[tuple[bytes, bytes]], end: bytes = b"--" + BOUNDARY + b"--\r\n") -> bytes:
    """Return a body of (headers, content) parts."""
    return b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (BOUNDARY, head, content) for head, content in parts) + end


def upload(file: bytes) -> bytes:
    """Return the request that uploads a file with a question."""
    head = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png'
    ask = (b'Content-Disposition: form-data; name="question"', b"what color is the shape?")
    return post(multipart([(head, file), ask]), MULTIPART)


def _carried(file: bytes, rng: Random) -> Shot:
    return Shot(upload(file) if rng.random() < 0.5 else post(json_body(file, "what color is the shape?")))


def bombs(rng: Random) -> Shot:
    """Small files that would be huge, or that claim to be."""
    return _carried(rng.choice(BOMBS)(), rng)


def damaged(rng: Random) -> Shot:
    """Files of many formats with other bytes in them, or cut off."""
    format, mode = rng.choice(FORMATS)
    try:
        file = bytearray(_file(format, mode))
    except (OSError, KeyError, ValueError):  # this Pillow does not write it
        file = bytearray(picture(7, rng.randrange(100)))
    for _ in range(rng.choice((0, 1, 3, 30))):
        file[rng.randrange(len(file))] = rng.randrange(256)
    if rng.random() < 0.4:
        del file[rng.randrange(len(file)) :]
    if rng.random() < 0.2:
        at = rng.randrange(len(file) + 1)
        file[at:at] = rng.randbytes(rng.randrange(1, 500))
    return _carried(bytes(file), rng)


def forms(rng: Random) -> Shot:
    """Multipart bodies that are damaged, doubled or strange."""
    file, text = picture(7, 5), b"what color is the shape?"
    image = b'Content-Disposition: form-data; name="image"; filename="a.png"'
    ask = b'Content-Disposition: form-data; name="question"'
    end = b"--" + BOUNDARY + b"--\r\n"
    right = multipart([(image, file), (ask, text)])
    bodies = (
        multipart([(image, file), (ask, text)], end=b""),
        multipart([(image, file), (image, file), (ask, text)]),
        multipart([(image, file), (ask, text), (ask, text)]),
        multipart([(image, file)]),
        multipart([(ask, text)]),
        multipart([(b'Content-Disposition: form-data; name="image"', file), (ask, text)]),
        multipart([(image, file), (ask.replace(b'"question"', b'"question"; filename="q"'), text)]),
        multipart([(image, file), (b"X: y", text)]),
        multipart([(image, file), (b"", text)]),
        multipart([(image, file), (b"Content-Disposition: form-data", text)]),
        multipart([(image, file), (b'Content-Disposition: form-data; name="\xff\xfe"', text)]),
        multipart([(image, file), (b'Content-Disposition: form-data; name="unknown"', text)]),
        multipart([(image, file), (ask, b"\xff\xfe\x80")]),
        multipart([(image, file), (ask, b"x" * 500_000)]),
        multipart([(image, file), (ask + b"\r\nX-Long: " + b"x" * 100_000, text)]),
        multipart([(image, file), (ask + b"".join(b"\r\nX-%d: 1" % i for i in range(5000)), text)]),
        multipart([(image, file), *[(ask, b"x")] * rng.randrange(100, 5000)]),
        multipart([(image.replace(b"a.png", b"../../../etc/passwd\x00"), file), (ask, text)]),
        multipart([(image + b"\r\nContent-Transfer-Encoding: base64", file), (ask, text)]),
        multipart([(image + b"\r\nContent-Type: multipart/mixed; boundary=y", b"--y\r\n\r\n--y--"), (ask, text)]),
        multipart([(image, file), (ask, text), (b'Content-Disposition: form-data; name="max_new_tokens"', b"1e9")]),
        multipart([(image, file), (ask, text), (b'Content-Disposition: form-data; name="temperature"', b"nan")]),
        end,
        b"",
        b"\r\n" * 5000,
        right.replace(b"\r\n", b"\n"),
        right + b"trailing" * 1000,
        b"preamble" * 1000 + right,
        right[: rng.randrange(len(right))],
        right.replace(b"--" + BOUNDARY, b"--" + BOUNDARY[:-1]),
    )
    body = rng.choice(bodies)
    if rng.random() < 0.15:
        changed = bytearray(right)
        for _ in range(rng.randrange(1, 10)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        body = bytes(changed)
    return Shot(post(body, MULTIPART))


KINDS: dict[str, Kind] = {"picture bombs": bombs, "damaged pictures": damaged, "multipart damage": forms}
