"""Preprocessing against transformers' SigLIP processor, and pictures that cannot be used."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pgfast.errors import ImageError
from pgfast.image import open_image, to_pixel_values
from pgfast.image_colors import BAND
from pgfast.manifest import ImageSpec


def spec(size: int, resampling: str = "bicubic") -> ImageSpec:
    return ImageSpec(size, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 1 / 255, resampling)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([56, 64, 224]), st.sampled_from(["bicubic", "bilinear"]))
def test_pixels_equal_the_siglip_processor(width: int, height: int, size: int, resampling: str) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    half = [0.5, 0.5, 0.5]
    processor = SiglipImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=half,
        image_std=half,
        resample={"bilinear": 2, "bicubic": 3}[resampling],
    )
    image = noise(width, height, width * 1000 + height)
    wanted = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
    ours = to_pixel_values(open_image(image), spec(size, resampling))
    assert ours.shape == (1, 3, size, size)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_path_bytes_pil_and_array_give_the_same_pixels(tmp_path: Path) -> None:
    image = noise(33, 21)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    wanted = to_pixel_values(image, spec(64))
    for given_as in (tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), np.asarray(image)):
        np.testing.assert_array_equal(to_pixel_values(open_image(given_as), spec(64)), wanted)


def test_arrays_of_every_layout(tmp_path: Path) -> None:
    rgb = np.asarray(noise(33, 21))
    rgba = np.dstack([rgb, np.full((21, 33), 128, np.uint8)])
    locked = rgb.copy()
    locked.flags.writeable = False
    wanted = np.asarray(open_image(rgb))
    np.testing.assert_array_equal(wanted, rgb)
    for given_as in (
        locked,
        np.asfortranarray(rgb),
        np.repeat(rgb, 2, axis=1)[:, ::2],
        rgb[::-1][::-1],
        rgb[..., ::-1][..., ::-1],
    ):
        np.testing.assert_array_equal(np.asarray(open_image(given_as)), wanted)
    for gray in (rgb[..., 0], rgb[..., :1]):
        np.testing.assert_array_equal(np.asarray(open_image(gray)), rgb[..., :1].repeat(3, axis=2))
    on_white = rgb * (128 / 255) + 255 * (127 / 255)
    assert np.abs(np.asarray(open_image(rgba)) - on_white).max() <= 1.01
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_image(rgba)), np.asarray(open_image(tmp_path / "a.png")))
    gaps = memoryview(np.repeat(np.frombuffer((tmp_path / "a.png").read_bytes(), np.uint8), 2))[::2]
    np.testing.assert_array_equal(np.asarray(open_image(gaps)), np.asarray(open_image(rgba)))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1), (3840, 2160)])
def test_extreme_sizes_equal_the_siglip_processor(width: int, height: int) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    half = [0.5, 0.5, 0.5]
    processor = SiglipImageProcessorPil(size={"height": 224, "width": 224}, image_mean=half, image_std=half, resample=3)
    pixels = np.asarray(noise(width, height))
    wanted = np.asarray(processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"])
    np.testing.assert_allclose(to_pixel_values(open_image(pixels), spec(224)), wanted, atol=1e-5)


def test_exif_orientation_is_applied() -> None:
    image = noise(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    upright = open_image(buffer.getvalue())
    assert upright.size == (20, 40)
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L"])
def test_transparency_is_the_same_in_bands(mode: str) -> None:
    height = 2 * BAND + 7
    random = np.random.default_rng(1)
    rgba = Image.fromarray(random.integers(0, 256, (height, 31, 4), dtype=np.uint8), "RGBA")
    if mode in ("P", "L"):  # one colour is the transparent one
        picture = rgba.convert("RGB").convert(mode)
        picture.info["transparency"] = 5
    else:
        picture = rgba.convert("P").convert("PA") if mode == "PA" else rgba.convert(mode)
    assert picture.has_transparency_data
    whole = picture.convert("RGBA")
    pixels = np.asarray(whole).astype(float)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    found = np.asarray(open_image(picture))
    assert found.shape == (height, 31, 3)
    assert np.abs(found - expected).max() <= 1.01  # Pillow rounds in its own way
    white = Image.new("RGBA", whole.size, (255, 255, 255, 255))
    assert np.array_equal(found, np.asarray(Image.alpha_composite(white, whole).convert("RGB")))


def test_transparency_becomes_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(open_image(rgba)).min() == 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("L", (5, 5), 128)
    converted = Image.fromarray(np.full((5, 5), 128 * 256, np.uint16)) if mode == "I;16" else image.convert(mode)
    rgb = np.asarray(open_image(converted))
    assert rgb.shape == (5, 5, 3)
    if mode not in ("1", "P"):
        assert abs(int(rgb[2, 2, 0]) - 128) <= 1


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_sixteen_bits_are_scaled_not_clipped(mode: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    if mode == "I":
        image = Image.fromarray(ramp.astype(np.int32))
    elif mode == "I;16":
        image = Image.fromarray(ramp)
    else:
        image = Image.frombytes("I;16B", (256, 4), ramp.astype(">u2").tobytes())
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(open_image(image))[0, :, 0], ramp[0] >> 8)


@pytest.mark.parametrize("image", [Image.new("F", (4, 4)), Image.new("I", (4, 4), 10**6), Image.new("I", (4, 4), -1)])
def test_values_without_a_known_range_are_refused(image: Image.Image) -> None:
    with pytest.raises(ImageError, match="8 bit"):
        open_image(image)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "JPEG")
    return buffer.getvalue()


def progressive(scans: int, *, stuffing: bytes = b"") -> bytes:
    """A progressive JPEG in which one scan comes again and again: each takes as long as a whole small picture."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "JPEG", progressive=True)
    head, first, *others, last = buffer.getvalue().split(b"\xff\xda")
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(stuffing)) + stuffing
    return b"\xff\xda".join([head[:2] + comment + head[2:], first, *[others[1]] * (scans - 2), last])


def test_many_scans_are_refused_and_what_only_looks_like_them_is_not(tmp_path: Path) -> None:
    good = progressive(12, stuffing=b"\xff\xda" * 1000) + b"\xff\xda" * 1000  # a thumbnail before, a film behind
    assert open_image(good).size == (64, 64)
    (tmp_path / "good.jpg").write_bytes(good)
    assert open_image(tmp_path / "good.jpg").size == (64, 64)
    assert open_image(progressive(100)).size == (64, 64)
    with pytest.raises(ImageError, match="more than 100 scans"):
        open_image(progressive(101))
    head, *scans = progressive(101).split(b"\xff\xda")
    hidden = head + b"\xff\xda" + b"\xff\x01\xff\xff\xda".join(scans)  # before each a marker that has no length
    with pytest.raises(ImageError, match="more than 100 scans"):
        open_image(hidden)


def icon() -> bytes:
    buffer = io.BytesIO()
    noise(32, 32).save(buffer, "ICO")
    return buffer.getvalue()


def bad_pictures(folder: Path) -> dict[str, tuple[object, str]]:
    """Name to (what is given, what the message must contain)."""
    files = {
        "truncated.jpg": jpeg()[:700],
        "text.png": b"this is a text file\n",
        "unicode.png": "Ein Bild \u2026 f\u00fcr sp\u00e4ter. ".encode() * 40,
        "page.jpg": b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
        "drawing.svg": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "paper.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "archive.zip": b"PK\x03\x04\x14\0\0\0\x08\0",
        "clip.mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
        "icon.ico": icon(),
        "unknown.bin": bytes(range(128, 256)) * 4,
        "empty.png": b"",
        "bomb.png": png_of_size(50_000, 50_000),
        "large.png": png_of_size(10_000, 8_500),
        "long.png": png_of_size(1, 79_000_000),
        "short.png": png_of_size(300, 300),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    (folder / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    return {
        "missing": (folder / "nowhere.png", "does not exist"),
        "truncated": (folder / "truncated.jpg", "damaged"),
        "text": (folder / "text.png", "not a picture"),
        "unicode": (folder / "unicode.png", "not a picture but text"),
        "web page": (folder / "page.jpg", "not a picture but a web page"),
        "drawing": (folder / "drawing.svg", "SVG drawing: save it as PNG"),
        "pdf": (folder / "paper.pdf", "a PDF: save the page as PNG"),
        "archive": (folder / "archive.zip", "unpack it first"),
        "video": (folder / "clip.mp4", "a video"),
        "icon": (folder / "icon.ico", "not a picture in a known format"),
        "unknown": (folder / "unknown.bin", "not a picture in a known format"),
        "empty": (folder / "empty.png", "is empty (0 bytes)"),
        "address": ("https://example.org/a.png", "an address, not a file"),
        "null byte": ("a\0b.png", "cannot be read"),
        "bomb": (folder / "bomb.png", "bomb"),
        "large": (folder / "large.png", "pixels"),
        "long": (folder / "long.png", "a side has at most 65,535"),
        "short": (folder / "short.png", "damaged"),
        "folder": (folder / "folder.png", "folder"),
        "postscript": (folder / "script.eps", "PostScript"),
        "empty bytes": (b"", "is empty (0 bytes)"),
        "channels first": (np.zeros((3, 8, 9), np.uint8), "transpose(1, 2, 0)"),
        "batch": (np.zeros((1, 8, 9, 3), np.uint8), "array[0]"),
        "two channels": (np.zeros((8, 9, 2), np.uint8), "uint8"),
        "float array": (np.zeros((4, 4, 3), np.float64), "(array * 255).round"),
        "bool array": (np.zeros((4, 4), np.bool_), "astype(numpy.uint8) * 255"),
        "16-bit array": (np.zeros((4, 4), np.uint16), ">> 8"),
        "large array": (np.broadcast_to(np.uint8(0), (9000, 9000)), "9000 x 9000 pixels"),
        "long array": (np.broadcast_to(np.uint8(0), (1, 70_000)), "70000 x 1 pixels: a side"),
        "zero array": (np.zeros((0, 4, 3), np.uint8), "uint8"),
        "number": (3, "int"),
    }


BAD = (
    *("missing", "truncated", "text", "unicode", "web page", "drawing", "pdf", "archive", "video", "icon", "unknown", "empty"),
    *("bomb", "large", "long", "short", "folder", "postscript", "empty bytes", "address", "null byte"),
)
BAD_VALUES = (
    *("float array", "bool array", "16-bit array", "channels first", "batch", "two channels", "large array", "long array"),
    *("zero array", "number"),
)


@pytest.mark.parametrize("name", BAD + BAD_VALUES)
def test_bad_pictures_get_one_clear_line(name: str, tmp_path: Path) -> None:
    pictures = bad_pictures(tmp_path)
    assert set(pictures) == {*BAD, *BAD_VALUES}
    given_as, message = pictures[name]
    with pytest.raises(ImageError, match=re.escape(message)) as caught:
        open_image(given_as)
    assert "\n" not in str(caught.value)
