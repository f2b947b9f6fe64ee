"""Masks in their boxes, and their run lengths against pycocotools."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mask_weights import save_weights
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions
from PIL import Image
from pycocotools import mask as coco

from pgfast.bundle import Bundle
from pgfast.errors import BundleError
from pgfast.loading import demo_bundle
from pgfast.masks import MaskDecoder, compressed, paint, place, run_lengths, to_rle

RANDOM = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32)


def hats(size: int, to: int) -> np.ndarray:
    """Weights [to, size] of a bilinear resize: a triangle around each new pixel's centre, wider when shrinking."""
    scale = size / to
    reach = max(scale, 1.0)
    centres = (np.arange(to) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centres[:, None]) / reach)
    return weights / weights.sum(axis=1, keepdims=True)


def whole(mask: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The mask resized to its box, wherever that lies, in float64."""
    x0, y0, x1, y1 = box
    return hats(mask.shape[0], y1 - y0) @ mask.astype(np.float64) @ hats(mask.shape[1], x1 - x0).T


boxes = st.tuples(*[st.integers(-60, 160)] * 2, *[st.integers(1, 150)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(box=boxes, width=st.integers(1, 120), height=st.integers(1, 120))
def test_a_mask_fills_the_part_of_its_box_that_is_in_the_picture(
    box: tuple[int, int, int, int], width: int, height: int
) -> None:
    placed = place(RANDOM, box, width, height)
    assert (placed.dtype, placed.shape) == (np.bool_, (height, width))
    x0, y0, x1, y1 = box
    values = whole(RANDOM, box)
    canvas = np.full((420, 420), -1.0)  # around the picture, which begins at 100, 100
    canvas[100 + y0 : 100 + y1, 100 + x0 : 100 + x1] = values
    wanted = canvas[100 : 100 + height, 100 : 100 + width]
    sure = np.abs(wanted) > 1e-4
    np.testing.assert_array_equal(placed[sure], wanted[sure] > 0)


@pytest.mark.parametrize("box", [(0, 0, 64, 64), (10, 20, 74, 30), (3, 5, 9, 90), (99, 99, 100, 100), (0, 0, 100, 100)])
def test_inside_the_picture_it_is_pillows_resize_compared_with_zero(box: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = box
    wanted = np.zeros((100, 100), bool)
    wanted[y0:y1, x0:x1] = np.asarray(Image.fromarray(RANDOM).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)) > 0
    np.testing.assert_array_equal(place(RANDOM, box, 100, 100), wanted)


def test_edges_are_rounded() -> None:
    everything = np.ones((64, 64), np.float32)
    placed = place(everything, (1.4, 2.6, 5.6, 7.4), 10, 9)
    wanted = np.zeros((9, 10), bool)
    wanted[3:7, 1:6] = True
    np.testing.assert_array_equal(placed, wanted)


@pytest.mark.parametrize(
    "box",
    [(5, 5, 5, 9), (5, 5, 9, 5), (9, 5, 5, 9), (5, 9, 9, 5), (5.1, 5, 5.4, 9), (-9, 0, 0, 9), (10, 0, 20, 9), (0, 9, 5, 12)],
)
def test_boxes_without_pixels_leave_nothing(box: tuple[float, float, float, float]) -> None:
    assert not place(np.ones((64, 64), np.float32), box, 10, 9).any()


def test_a_box_far_beyond_the_picture_costs_no_more_than_the_picture() -> None:
    half = np.ones((64, 64), np.float32)
    half[:, 32:] = -1
    placed = place(half, (-(10**5), -(10**5), 10**5 + 10, 10**5 + 10), 10, 10)
    np.testing.assert_array_equal(placed, np.tile(np.arange(10) < 5, (10, 1)))


def test_painting_mixes_half_and_half_where_the_mask_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    mask, before = np.random.default_rng(1).random((7, 9)) < 0.5, picture.copy()
    paint(picture, mask, (255, 0, 99))
    np.testing.assert_array_equal(picture[~mask], before[~mask])
    wanted = (before[mask].astype(float) + np.array([255, 0, 99])) / 2
    assert np.abs(picture[mask] - wanted).max() <= 0.5


def arrays(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    seed, density = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    return np.random.default_rng(seed).random((height, width)) < density


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools.decode
@given(mask=st.composite(arrays)())
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    counts, rle = run_lengths(mask), to_rle(mask)
    assert rle["size"] == list(mask.shape)
    assert sum(counts) == mask.size
    if mask.size:  # of an empty one pycocotools makes one that it cannot read
        theirs = coco.encode(np.asfortranarray(mask, np.uint8))
        assert rle["counts"] == theirs["counts"].decode()
        assert coco.area(rle) == mask.sum()
        height, width = mask.shape
        assert coco.frPyObjects({"counts": counts, "size": [height, width]}, height, width)["counts"] == theirs["counts"]
        np.testing.assert_array_equal(coco.decode(rle), mask)


@given(counts=st.lists(st.integers(0, 2**24), min_size=1, max_size=30))
def test_any_counts_are_compressed_as_pycocotools_does(counts: list[int]) -> None:
    height = sum(counts)
    theirs = coco.frPyObjects({"counts": counts, "size": [height, 1]}, height, 1)
    assert compressed(counts) == theirs["counts"].decode()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    npz = save_weights(folder / "masks.npz")
    export(str(demo_bundle()), folder / "out", ExportOptions(mask_decoder=npz))
    return folder / "out"


def test_the_graph_is_opened_once_and_by_several_threads(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pgfast import masks

    opened = []

    def counting(*args: object, **kwargs: object) -> object:
        opened.append(args)
        return real(*args, **kwargs)

    real: object = masks.open_session
    monkeypatch.setattr(masks, "open_session", counting)
    decoder = MaskDecoder(Bundle.open(bundle))
    assert decoder.present
    assert not opened
    codes = np.random.default_rng(0).integers(0, 128, (8, 16)).tolist()
    results: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: decoder.decode([codes[i]])})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1
    together = decoder.decode(codes)
    assert (together.dtype, together.shape) == (np.float32, (8, 64, 64))
    for i, row in enumerate(together):
        np.testing.assert_allclose(results[i][0], row, atol=1e-5)
    assert not MaskDecoder(Bundle.open(demo_bundle())).present


def test_a_graph_that_is_no_graph_is_the_bundles_fault(bundle: Path, tmp_path: Path) -> None:
    import json
    import shutil

    from pgfast.bundle import describe_file

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "mask_decoder.onnx").write_bytes(b"no graph")
    raw = json.loads((copy / "pgfast.json").read_text())
    entry = describe_file(copy / "mask_decoder.onnx")
    raw["files"]["mask_decoder.onnx"] = {"sha256": entry.sha256, "size": entry.size}
    (copy / "pgfast.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"mask_decoder\.onnx is not a graph"):
        MaskDecoder(Bundle.open(copy)).decode([[0] * 16])
    with pytest.raises(BundleError, match="the mask decoder fails"):
        MaskDecoder(Bundle.open(bundle)).decode([[128] * 16])
