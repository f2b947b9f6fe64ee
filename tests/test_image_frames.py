"""Pictures of several frames, against the frames that they were made of: which one is used, and what is said about it."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from picture_files import animation, frames, opened, scene, seeds, tiff
from PIL import Image

from pgfast.image import open_image


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("as_file", [True, False])
def test_the_first_frame_is_used_and_said(format: str, as_file: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = animation(format)
    (tmp_path / "a.bin").write_bytes(data)
    found = opened(tmp_path / "a.bin" if as_file else data)
    assert np.abs(found - [255, 0, 0]).max() <= 6
    (record,) = caplog.records
    unit = "pages" if format == "TIFF" else "frames"
    name = str(tmp_path / "a.bin") if as_file else "the picture"
    assert record.getMessage() == f"{name} has 3 {unit}: the first one is used"
    assert record.levelno == logging.WARNING
    assert record.name.startswith("pgfast.")


@pytest.mark.parametrize("name", [name for name in seeds() if "animated" not in name and name not in ("apng", "tiff pages")])
def test_nothing_is_said_about_one_frame(name: str, caplog: pytest.LogCaptureFixture) -> None:
    open_image(seeds()[name])
    assert not caplog.records


def test_the_frame_that_a_caller_chose_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with Image.open(io.BytesIO(animation("GIF"))) as image:
        image.seek(2)
        np.testing.assert_array_equal(opened(image)[0, 0], [0, 0, 255])
    assert not caplog.records


def test_mpo_is_its_first_picture_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert np.abs(opened(animation("MPO", 2)) - [255, 0, 0]).max() <= 2
    assert not caplog.records


@pytest.mark.parametrize("pages", [1, 2, 40])
def test_pages_are_counted(pages: int, caplog: pytest.LogCaptureFixture) -> None:
    open_image(tiff(scene()[..., 0].tobytes(), 40, 30, 8, pages=pages))
    assert [record.getMessage() for record in caplog.records] == [
        f"the picture has {pages} pages: the first one is used" for _ in range(pages > 1)
    ]


def test_several_pictures_in_a_heic(caplog: pytest.LogCaptureFixture) -> None:
    heif = pytest.importorskip("pillow_heif")
    several, buffer = heif.HeifFile(), io.BytesIO()
    for image in frames(3):
        several.add_from_pillow(image.resize((64, 64)))
    several.save(buffer, quality=95, primary_index=1)
    assert np.abs(opened(buffer.getvalue())[32, 32] - [0, 255, 0]).max() <= 6
    assert [record.getMessage() for record in caplog.records] == ["the picture has 3 pictures: the main one is used"]
