"""Every format and kind of picture, against its specification's arithmetic, its own library, or the picture it came from."""

from __future__ import annotations

import io
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import bmp, chunk, opened, png, saved, scene, seeds, tiff, tiled_tiff, with_orientation
from PIL import Image

from pgfast.errors import ImageError
from pgfast.image import open_image

ROOT = Path(__file__).parent.parent


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """rgb [H, W, 3], alpha [H, W] in 0..1."""
    return rgb * alpha[..., None] + 255 * (1 - alpha[..., None])


# ---- the same picture, however it is given ----


@pytest.mark.parametrize("name", seeds())
def test_path_bytes_pil_and_array_are_one_picture(name: str, tmp_path: Path) -> None:
    data = seeds()[name]
    (tmp_path / "picture").write_bytes(data)
    from_bytes = opened(data)
    np.testing.assert_array_equal(opened(tmp_path / "picture"), from_bytes)
    if name != "heic":  # Pillow alone does not know it
        with Image.open(tmp_path / "picture") as lazy:
            np.testing.assert_array_equal(opened(lazy), from_bytes)
    np.testing.assert_array_equal(opened(from_bytes.astype(np.uint8)), from_bytes)


# ---- JPEG ----


def test_jpeg_is_the_picture_it_came_from_and_progressive_is_the_same() -> None:
    rgb = Image.fromarray(scene())
    baseline = opened(saved(rgb, "JPEG", quality=95, subsampling=0))
    assert np.abs(baseline - scene()).max() <= 8
    np.testing.assert_array_equal(opened(saved(rgb, "JPEG", quality=95, subsampling=0, progressive=True)), baseline)
    gray = opened(saved(rgb.convert("L"), "JPEG", quality=95))
    assert np.abs(gray - np.asarray(rgb.convert("L"))[..., None]).max() <= 4


CMYK = (30, 120, 200, 40)
"""Ink, 255 is full."""


def inks_on_paper(c: float, m: float, y: float, k: float) -> np.ndarray:
    return np.array([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)])


def test_cmyk_jpeg_has_adobes_inverted_values() -> None:
    data = saved(Image.new("CMYK", (16, 16), CMYK), "JPEG", quality=100)
    assert b"Adobe" in data  # the values in the file are 255 - ink
    assert np.abs(opened(data) - inks_on_paper(*CMYK)).max() <= 2


def test_ycck_jpeg() -> None:
    data = bytearray(saved(Image.new("CMYK", (16, 16), CMYK), "JPEG", quality=100))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2  # the same values, now luma and chroma: of 255 - C, 255 - M, 255 - Y, which are inverted once more
    luma, blue, red = (255 - ink for ink in CMYK[:3])
    inks = [luma + 1.402 * (red - 128), luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128), luma + 1.772 * (blue - 128)]
    assert np.abs(opened(bytes(data)) - inks_on_paper(*np.clip(inks, 0, 255), CMYK[3])).max() <= 3


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""What EXIF's numbers say must be done with the stored rows."""


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("number", UPRIGHT)
def test_orientation(number: int, format: str) -> None:
    options = {"WEBP": {"lossless": True}, "AVIF": {"speed": 10}, "MPO": {"save_all": True}}.get(format, {})
    stored = Image.fromarray(scene())
    plain = opened(saved(stored, format, **options))
    turned = opened(saved(stored, format, exif=with_orientation(number), **options))
    np.testing.assert_array_equal(turned, UPRIGHT[number](plain))


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_orientations_that_do_not_exist_change_nothing(number: int) -> None:
    np.testing.assert_array_equal(opened(saved(Image.fromarray(scene()), "PNG", exif=with_orientation(number))), scene())


def test_orientation_in_xmp() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    data = saved(Image.fromarray(scene()), "WEBP", lossless=True, xmp=xmp)
    np.testing.assert_array_equal(opened(data), UPRIGHT[8](scene()))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff"])
def test_damaged_metadata_is_no_reason_to_refuse_pixels(exif: bytes) -> None:
    rgb = Image.fromarray(scene())
    np.testing.assert_array_equal(opened(saved(rgb, "JPEG", exif=exif)), opened(saved(rgb, "JPEG")))


def test_color_profiles_are_not_looked_at() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    np.testing.assert_array_equal(opened(saved(Image.fromarray(scene()), "PNG", icc_profile=profile)), scene())


# ---- PNG, made byte by byte ----


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 4), (16, 4), (8, 6), (16, 6)]),
    st.booleans(),
    st.integers(1, 19),
    st.integers(1, 19),
    st.integers(0, 2**32 - 1),
)
def test_png_of_every_depth(kind: tuple[int, int], interlaced: bool, width: int, height: int, seed: int) -> None:
    bits, color = kind
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    samples = np.random.default_rng(seed).integers(0, 2**bits, (height, width, channels))
    eight = samples >> 8 if bits == 16 else samples * 255 // (2**bits - 1)
    expected = eight[..., : channels - 1] if color in (4, 6) else eight
    expected = np.broadcast_to(expected, (height, width, 3))
    if color in (4, 6):
        expected = on_white(expected, eight[..., -1] / 255)
    given_as = samples[..., 0] if channels == 1 else samples
    assert np.abs(opened(png(given_as, bits, color, interlaced=interlaced)) - expected).max() <= 1.01


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_level_of_gray_is_transparent(bits: int) -> None:
    samples = np.arange(min(2**bits, 256)).reshape(1, -1) * max(2**bits // 256, 1)
    chosen = int(samples[0, samples.size // 2])
    found = opened(png(samples, bits, 0, before=chunk(b"tRNS", chosen.to_bytes(2))))
    eight = samples[0] >> 8 if bits == 16 else samples[0] * 255 // (2**bits - 1)
    np.testing.assert_array_equal(found[0, :, 0], np.where(samples[0] == chosen, 255, eight))


@pytest.mark.parametrize("bits", [8, 16])
def test_one_color_is_transparent(bits: int) -> None:
    samples = np.array([[[1, 2, 3], [1, 2, 4], [200, 100, 50]]]) * (257 if bits == 16 else 1)
    key = b"".join(int(value).to_bytes(2) for value in samples[0, 0])
    found = opened(png(samples, bits, 2, before=chunk(b"tRNS", key)))
    np.testing.assert_array_equal(found[0], [[255, 255, 255], [1, 2, 4], [200, 100, 50]])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [None, bytes([255, 0]), bytes([128, 77])])
def test_palette(bits: int, alphas: bytes | None) -> None:
    colors = np.random.default_rng(bits).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    indices = np.random.default_rng(1).integers(0, 2**bits, (9, 11))
    before = chunk(b"PLTE", colors.tobytes()) + (chunk(b"tRNS", alphas) if alphas else b"")
    alpha = np.full(2**bits, 255)
    alpha[: len(alphas or b"")] = list(alphas or b"")
    expected = on_white(colors[indices].astype(float), alpha[indices] / 255)
    assert np.abs(opened(png(indices, bits, 3, before=before)) - expected).max() <= 1.01


def test_chunks_behind_the_pixels_change_nothing() -> None:
    behind = chunk(b"acTL", b"\0" * 8) + chunk(b"tEXt", b"a\0b") + chunk(b"acTL", b"\xff" * 8) + chunk(b"oDDs", b"?")
    np.testing.assert_array_equal(opened(png(scene(), 8, 2, behind=behind)), scene())


def test_gif_with_a_transparent_color() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    image.putdata([0, 1, 2, 1])
    found = opened(saved(image, "GIF", transparency=1, optimize=False))
    np.testing.assert_array_equal(found[0], [[9, 9, 9], [255, 255, 255], [0, 200, 0], [255, 255, 255]])


# ---- TIFF ----

GRAY16 = np.arange(0, 65536, 13).astype(np.uint16)[:5000].reshape(50, 100)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_16_bits(order: str) -> None:
    data = GRAY16.astype(f"{order}u2").tobytes()
    np.testing.assert_array_equal(opened(tiff(data, 100, 50, 16, order=order))[..., 0], GRAY16 >> 8)
    deflated = zlib.compress(data)
    np.testing.assert_array_equal(opened(tiff(deflated, 100, 50, 16, order=order, tags=[(259, 8)]))[..., 0], GRAY16 >> 8)


def test_tiff_whose_white_is_0() -> None:
    assert np.abs(opened(tiff(GRAY16.tobytes(), 100, 50, 16, tags=[(262, 0)]))[..., 0] - (65535 - GRAY16) / 257).max() <= 1
    eight = scene()[..., 0]
    np.testing.assert_array_equal(opened(tiff(eight.tobytes(), 40, 30, 8, tags=[(262, 0)]))[..., 0], 255 - eight.astype(int))


def test_tiff_of_12_bits() -> None:
    values = np.arange(0, 4096, 8)
    first, second = values[::2], values[1::2]  # three bytes for two pixels
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8)
    np.testing.assert_array_equal(opened(tiff(packed.tobytes(), 512, 1, 12))[0, :, 0], values >> 4)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "CMYK", "P"])
def test_tiff_compressions_keep_every_pixel(mode: str, compression: str | None) -> None:
    image = Image.fromarray(scene()).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(scene()[..., 1]))
    np.testing.assert_array_equal(opened(saved(image, "TIFF", compression=compression)), opened(image))


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_bilevel_tiff(compression: str) -> None:
    bilevel = scene()[..., 0] > scene()[..., 1]
    image = Image.fromarray(bilevel)
    np.testing.assert_array_equal(opened(saved(image, "TIFF", compression=compression))[..., 0], bilevel * 255)


def test_cmyk_tiff() -> None:
    assert np.abs(opened(saved(Image.new("CMYK", (4, 4), CMYK), "TIFF")) - inks_on_paper(*CMYK)).max() <= 1


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=r"cannot be used: .* have no known range: convert the picture to 8 bits"):
        open_image(saved(Image.new(mode, (4, 4), 300), "TIFF"))


def test_tiles() -> None:
    gray = scene(32, 32)[..., 0]
    np.testing.assert_array_equal(opened(tiled_tiff(gray, 32))[..., 0], gray)
    with pytest.raises(ImageError, match="tiles of 32768 x 32768 pixels"):
        open_image(tiled_tiff(gray, 32, width=32768, length=32768))


# ---- the others ----


@pytest.mark.parametrize("bits", [24, 32])
def test_bmp(bits: int) -> None:
    rgb = scene(41, 30)  # rows are padded
    np.testing.assert_array_equal(opened(bmp(rgb, bits)), rgb)


@pytest.mark.parametrize("most", [15, 255, 1023, 65535])
def test_pgm_and_ppm_of_every_depth(most: int) -> None:
    values = np.linspace(0, most, 60).round().astype(int).reshape(3, 20)
    dtype = ">u2" if most > 255 else np.uint8
    found = opened(b"P5\n20 3\n%d\n" % most + values.astype(dtype).tobytes())
    assert np.abs(found[..., 0] - values * 255 / most).max() <= 1
    plain = opened(b"P2\n20 3\n%d\n" % most + b" ".join(b"%d" % value for value in values.reshape(-1)))
    np.testing.assert_array_equal(plain, found)
    colors = values.reshape(3, 20, 1).repeat(3, axis=2)
    found = opened(b"P6\n20 3\n%d\n" % most + colors.astype(dtype).tobytes())
    assert np.abs(found - colors * 255 / most).max() <= 1


def test_pbm() -> None:
    bilevel = scene()[..., 0] > 100
    np.testing.assert_array_equal(opened(saved(Image.fromarray(bilevel), "PPM"))[..., 0], bilevel * 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp(mode: str) -> None:
    rgba = np.dstack([scene(), scene()[..., 1]])
    image = Image.fromarray(rgba).convert(mode)
    expected = on_white(rgba[..., :3].astype(float), rgba[..., 3] / 255) if mode == "RGBA" else scene()
    assert np.abs(opened(saved(image, "WEBP", lossless=True, exact=True)) - expected).max() <= 1.01
    assert np.abs(opened(saved(image, "WEBP", quality=95)) - expected).mean() <= 4


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_jpeg_2000(mode: str) -> None:
    image = Image.fromarray(np.dstack([scene(), scene()[..., 1]])).convert(mode)
    np.testing.assert_array_equal(opened(saved(image, "JPEG2000", irreversible=False)), opened(image))


def test_jpeg_2000_of_16_bits() -> None:
    np.testing.assert_array_equal(opened(saved(Image.fromarray(GRAY16), "JPEG2000"))[..., 0], GRAY16 >> 8)


def test_avif() -> None:
    assert np.abs(opened(saved(Image.fromarray(scene()), "AVIF", quality=95, speed=10)) - scene()).mean() <= 3


def test_a_pillow_without_a_format_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    with pytest.raises(ImageError, match="AVIF support not installed"):
        open_image(seeds()["avif"])


def test_heic_is_what_its_library_reads() -> None:
    heif = pytest.importorskip("pillow_heif")
    data = seeds()["heic"]
    found = opened(data)
    np.testing.assert_array_equal(found, np.asarray(heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)))
    assert np.abs(found - scene()).mean() <= 4


@pytest.mark.parametrize("number", UPRIGHT)
def test_orientation_of_heic(number: int) -> None:
    heif = pytest.importorskip("pillow_heif")

    def written(exif: Image.Exif) -> bytes:
        buffer = io.BytesIO()
        heif.from_pillow(Image.fromarray(scene())).save(buffer, quality=95, exif=exif.tobytes())
        return buffer.getvalue()

    np.testing.assert_array_equal(
        opened(written(with_orientation(number))), UPRIGHT[number](opened(written(with_orientation(1))))
    )


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"msf1\0\0\0\0hevcmsf1"])
def test_heic_without_its_library(brands: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="HEIC picture, which needs one more library: pip install pillow-heif"):
        open_image((8 + len(brands)).to_bytes(4) + b"ftyp" + brands)


def test_avif_does_not_need_the_library_of_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = seeds()["avif"]
    as_image = data.replace(b"ftypavif", b"ftypmif1", 1)
    assert b"avif" in as_image[:40]
    np.testing.assert_array_equal(opened(as_image), opened(data))


def test_pillow_is_left_as_it_was() -> None:
    open_image(seeds().get("heic", seeds()["jpeg"]))
    assert "HEIF" not in Image.OPEN


# ---- the table in the docs ----


def test_the_docs_name_every_format() -> None:
    from pgfast.image_files import FORMATS, NAMES

    text = (ROOT / "docs" / "pictures.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| format")]
    named = " ".join(row.split("|")[1] for row in rows)
    for name in NAMES.split(", "):
        assert re.search(rf"\b{name}\b", named), name
    assert len(FORMATS) + 1 == len(NAMES.split(", "))
