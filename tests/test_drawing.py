"""Boxes drawn on pictures: which pixels change, and which do not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFont

from pgfast.drawing import FORMATS, draw_detections, label_colors, output_format, save_picture
from pgfast.errors import InputError
from pgfast.types import Detection

GRAY = Image.new("RGB", (400, 300), (90, 90, 90))


def drawn(*detections: tuple[str, tuple[float, float, float, float]], picture: Image.Image = GRAY) -> NDArray[np.uint8]:
    before = np.asarray(picture).copy()
    result = draw_detections(picture, [Detection(label, box, 0.5) for label, box in detections])
    assert np.array_equal(np.asarray(picture), before)
    assert (result.mode, result.size) == (picture.mode, picture.size)
    return np.asarray(result)


def changed(pixels: NDArray[np.uint8], picture: Image.Image = GRAY) -> NDArray[np.bool_]:
    changes: NDArray[np.bool_] = (pixels != np.asarray(picture)).any(axis=2)
    return changes


def plate(size: tuple[int, int]) -> int:
    """Height of a label in a picture of this size, by Pillow's own measure."""
    font = ImageFont.load_default(max(10, round(min(size) / 32)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    ascent, descent = font.getmetrics()
    return ascent + descent + 2 * max(1, ascent // 6)


def test_a_box_is_outlined_and_its_label_stands_above() -> None:
    pixels = drawn(("cat", (100, 120, 260, 240)))
    seen = changed(pixels)
    color = label_colors(["cat"])["cat"]
    for row, column in ((121, 180), (238, 180), (180, 101), (180, 258)):  # second pixel from each edge
        assert tuple(pixels[row, column]) == color
    for row, column in ((120, 180), (239, 180), (180, 100), (180, 259), (122, 180), (180, 102)):  # black on both sides of it
        assert tuple(pixels[row, column]) == (0, 0, 0)
    assert not seen[123:237, 103:257].any()  # what is inside stays to be seen
    above = plate(GRAY.size)
    assert seen[120 - above : 120, 100:112].all()
    seen[120 - above : 240, 100:260] = False
    assert not seen.any()
    text = pixels[120 - above : 120, 100:140].reshape(-1, 3)
    assert (text == color).all(axis=1).any()
    assert (text.sum(axis=1) < 60).any()  # dark letters


def test_nothing_found_changes_nothing() -> None:
    assert not changed(drawn()).any()


def test_each_label_has_a_color_of_its_own() -> None:
    pixels = drawn(("cat", (10, 50, 100, 100)), ("dog", (150, 50, 250, 100)), ("cat", (300, 50, 390, 100)))
    cat, dog, other = (tuple(pixels[80, left + 1]) for left in (10, 150, 300))
    assert cat == other != dog
    colors = label_colors([f"label {i}" for i in range(30)])
    assert len(set(colors.values())) == 30
    for red, green, blue in colors.values():  # WCAG contrast of black text
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red / 255, green / 255, blue / 255)]
        assert (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) / 0.05 > 4.5
    values = np.array(list(colors.values()), int)[:8]
    distances = np.abs(values[:, None] - values[None]).sum(axis=2)[~np.eye(8, dtype=bool)]
    assert distances.min() > 60


@pytest.mark.parametrize(
    "box", [(0, 0, 60, 60), (340, 0, 399.6, 40), (380, 280, 399.6, 299.7), (0, 0, 399.6, 299.7), (0, 290, 20, 299.7)]
)
def test_labels_at_the_border_stay_whole(box: tuple[float, float, float, float]) -> None:
    """The same plate as in the middle of the picture, moved."""
    high = plate(GRAY.size)
    middle = drawn(("traffic light", (100, 120, 260, 240)))[120 - high : 120]
    columns = np.flatnonzero(changed(middle, GRAY.crop((0, 0, 400, high))).any(axis=0))
    expected = middle[:, columns]
    wide = expected.shape[1]
    left, top = int(min(box[0], 400 - wide)), int(box[1] - high if box[1] >= high else min(box[1], 300 - high))
    assert np.array_equal(drawn(("traffic light", box))[top : top + high, left : left + wide], expected)


@pytest.mark.parametrize("color", ["black", "white", "red", "yellow", "gray", "blue"])
def test_lines_are_seen_on_any_background(color: str) -> None:
    picture = Image.new("RGB", (200, 200), color)
    pixels = drawn(("cat", (50, 60, 150, 160)), picture=picture).astype(int)
    line = pixels[100, 50:53]
    assert np.abs(line - np.asarray(picture)[0, 0].astype(int)).sum(axis=1).max() > 150


def test_lines_and_letters_grow_with_the_picture() -> None:
    small, large = (
        changed(
            drawn(("cat", (s * 0.25, s * 0.25, s * 0.75, s * 0.75)), picture=Image.new("RGB", (s, s), (90, 90, 90))),
            Image.new("RGB", (s, s), (90, 90, 90)),
        )
        for s in (300, 3000)
    )
    assert small[150, :150].sum() == 3
    assert 20 <= large[1500, :1500].sum() <= 30
    assert plate((3000, 3000)) > 5 * plate((300, 300))


@pytest.mark.parametrize("label", ["猫", "кот", "🐈", "a\nb\tc\0", "\u202eabc", "x" * 500, "\ud800", "", "שלום"])
def test_any_label_is_drawn(label: str) -> None:
    assert changed(drawn((label, (100, 120, 260, 240))))[121, 180]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_box_in_any_picture(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    bins = st.tuples(st.integers(0, 1023), st.integers(0, 1023)).filter(lambda pair: pair[0] != pair[1]).map(sorted)
    (x0, x1), (y0, y1) = data.draw(bins), data.draw(bins)
    box = (x0 * width / 1024, y0 * height / 1024, x1 * width / 1024, y1 * height / 1024)
    picture = Image.new("RGB", (width, height), (90, 90, 90))
    seen = changed(drawn(("", box), picture=picture), picture)  # without a label only the box
    inside = np.zeros_like(seen)
    inside[int(box[1]) : int(np.ceil(box[3])), int(box[0]) : int(np.ceil(box[2]))] = True
    assert seen.any()
    assert not (seen & ~inside).any()
    drawn((data.draw(st.text(max_size=9)), box), picture=picture)


# ---- files


@pytest.mark.parametrize("ending", FORMATS)
def test_the_ending_says_the_format(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{ending.upper()}"
    path.write_bytes(b"something older")
    save_picture(GRAY, path)
    with Image.open(path) as again:
        assert (again.format, again.size) == (FORMATS[ending], GRAY.size)
        assert np.abs(np.asarray(again.convert("RGB")).astype(int) - 90).max() <= 2
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out\.gif: the ending says the format, one of \.png, \.jpg"):
        output_format("out.gif")
    with pytest.raises(InputError, match="the ending says"):
        save_picture(GRAY, tmp_path / "png")
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        save_picture(GRAY, tmp_path / "none" / "out.png")
    old = tmp_path / "out.webp"
    old.write_bytes(b"old")
    with pytest.raises(InputError, match="cannot be written"):
        save_picture(Image.new("RGB", (20000, 1)), old)  # WebP ends at 16,383
    assert old.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.webp"]
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        save_picture(GRAY, tmp_path / "folder.png")
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "out.webp"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of 255 bytes")
def test_long_names(tmp_path: Path) -> None:
    save_picture(GRAY, tmp_path / f"{'x' * 251}.png")
    save_picture(GRAY, tmp_path / f"{'猫' * 83}.png")
    assert len(os.listdir(tmp_path)) == 2
