"""Small picture files of every kind, some made byte by byte where Pillow cannot write them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from pgfast.image import open_image


def scene(width: int = 40, height: int = 30) -> np.ndarray:
    """uint8 [H, W, 3]: smooth, so that lossy formats keep it, and different in every corner."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    return np.stack([red, green, 128 + 60 * np.sin(x / 9)], axis=-1).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def frames(count: int, mode: str = "RGB") -> list[Image.Image]:
    """Pictures of one colour each, red first."""
    return [Image.new("RGB", (20, 16), color).convert(mode) for color in ("red", "lime", "blue", "white")[:count]]


def animation(format: str, count: int = 3, **options: object) -> bytes:
    first, *others = frames(count)
    return saved(first, format, save_all=True, append_images=others, **options)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column, first row, step of columns, step of rows."""


def png(
    samples: np.ndarray, bits: int, color: int, *, before: bytes = b"", behind: bytes = b"", interlaced: bool = False
) -> bytes:
    """A PNG from its samples, [H, W] or [H, W, channels], as the specification lays them out."""
    height, width = samples.shape[:2]
    parts = [samples[y::dy, x::dx] for x, y, dx, dy in PASSES] if interlaced else [samples]
    rows = b"".join(b"\0" + _packed(row, bits) for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + behind
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def _packed(row: np.ndarray, bits: int) -> bytes:
    if bits == 16:
        return row.astype(">u2").tobytes()
    if bits == 8:
        return row.astype(np.uint8).tobytes()
    planes = (row.reshape(-1, 1) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(planes.reshape(-1).astype(np.uint8)).tobytes()


def tiff(
    data: bytes,
    width: int,
    height: int,
    bits: int,
    *,
    pages: int = 1,
    order: str = "<",
    tags: Sequence[tuple[int, int | None]] = (),
) -> bytes:
    """A gray TIFF of one strip per page; `tags` replace the usual ones or come on top, None leaves one out."""
    usual = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)} | dict(tags)
    entries = sorted((tag, value) for tag, value in usual.items() if value is not None)
    body = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data)) + data
    for page in range(pages):
        place = 8 + len(data) + page * (6 + 12 * len(entries))
        body += struct.pack(f"{order}H", len(entries))
        body += b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
        body += struct.pack(f"{order}I", place + 6 + 12 * len(entries) if page + 1 < pages else 0)
    return body


def tiled_tiff(gray: np.ndarray, side: int, **claimed: int) -> bytes:
    """A gray TIFF of one deflated tile; `claimed` changes what the tags say of its size."""
    data = zlib.compress(np.ascontiguousarray(gray[:side, :side]).tobytes())
    width, length = claimed.get("width", side), claimed.get("length", side)
    tags = [(259, 8), (273, None), (278, None), (279, None), (322, width), (323, length), (324, 8), (325, len(data))]
    return tiff(data, side, side, 8, tags=tags)


def bmp(rgb: np.ndarray, bits: int) -> bytes:
    """A BMP of 24 or 32 bits, from the bottom up."""
    height, width = rgb.shape[:2]
    bgr = rgb[::-1, :, ::-1]
    if bits == 32:
        bgr = np.dstack([bgr, np.zeros((height, width), np.uint8)])
    rows = [row.tobytes() + b"\0" * (-row.nbytes % 4) for row in np.ascontiguousarray(bgr)]
    data = b"".join(rows)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(data), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + header + data


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@cache
def seeds() -> dict[str, bytes]:
    """A file of every format and kind that is read."""
    rgb = Image.fromarray(scene())
    gray, cmyk = rgb.convert("L"), rgb.convert("CMYK")
    rgba = Image.fromarray(np.dstack([scene(), scene()[..., 0]]))
    deep = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    wide = scene().astype(np.uint16) * 257
    palette = rgb.quantize(16)
    files = {
        "jpeg": saved(rgb, "JPEG"),
        "jpeg progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg gray": saved(gray, "JPEG"),
        "jpeg cmyk": saved(cmyk, "JPEG"),
        "jpeg exif": saved(rgb, "JPEG", exif=with_orientation(6), icc_profile=b"profile" * 20, comment=b"comment"),
        "mpo": animation("MPO", 2),
        "png": saved(rgb, "PNG"),
        "png alpha": saved(rgba, "PNG"),
        "png gray alpha": saved(rgba.convert("LA"), "PNG"),
        "png palette": saved(palette, "PNG"),
        "png palette alpha": saved(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "png bilevel": saved(rgb.convert("1"), "PNG"),
        "png 16": saved(Image.fromarray(deep), "PNG"),
        "png 16 color": png(wide, 16, 2, before=chunk(b"tRNS", b"\0" * 6)),
        "png interlaced": png(scene(), 8, 2, interlaced=True, behind=chunk(b"tEXt", b"Title\0words")),
        "apng": animation("PNG"),
        "webp": saved(rgb, "WEBP"),
        "webp lossless": saved(rgb, "WEBP", lossless=True, exif=with_orientation(3)),
        "webp alpha": saved(rgba, "WEBP"),
        "webp animated": animation("WEBP"),
        "gif": saved(palette, "GIF"),
        "gif animated": animation("GIF", duration=50, loop=0),
        "tiff": saved(rgb, "TIFF"),
        "tiff lzw": saved(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": saved(rgba, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": saved(rgb, "TIFF", compression="jpeg"),
        "tiff g4": saved(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff cmyk": saved(cmyk, "TIFF"),
        "tiff 16": saved(Image.fromarray(deep), "TIFF"),
        "tiff pages": animation("TIFF"),
        "tiff tiled": tiled_tiff(scene(32, 32)[..., 0], 32),
        "bmp": saved(rgb, "BMP"),
        "bmp palette": saved(palette, "BMP"),
        "ppm": saved(rgb, "PPM"),
        "pgm 16": saved(Image.fromarray(deep), "PPM"),
        "pgm plain": b"P2\n# words\n3 2\n15\n0 1 2\n3 4 15\n",
        "jpeg 2000": saved(rgb, "JPEG2000"),
        "jpeg 2000 codestream": saved(gray, "JPEG2000", no_jp2=True),
        "avif": saved(rgb, "AVIF", speed=10),
        "avif animated": animation("AVIF", speed=10),
    }
    return files | heif_seeds(rgb)


def heif_seeds(image: Image.Image) -> dict[str, bytes]:
    """Nothing, where pillow-heif is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return {}
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90)
    return {"heic": buffer.getvalue()}


def opened(data: object) -> np.ndarray:
    """int [H, W, 3], so that differences have a sign."""
    return np.asarray(open_image(data)).astype(int)
