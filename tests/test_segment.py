"""`Engine.segment` and `pgfast segment`: the model's words are chosen, all that is made of them is real."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import DEMO_CHECKPOINT
from mask_weights import save_weights
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import pgfast
from pgfast.cli import main
from pgfast.drawing import draw_detections, label_colors
from pgfast.engine import Engine
from pgfast.errors import InputError, PromptError
from pgfast.loading import demo_bundle
from pgfast.masks import draw_segments
from pgfast.types import Answer, GenerateOptions, Segments, Timings

BLUE = str(demo_bundle().parent / "blue_circle.png")  # 640 x 640
CODES = [int(code) for code in np.random.default_rng(5).integers(0, 128, 16)]
OTHER_CODES = CODES[::-1]
BOX, OTHER_BOX = "<loc0256><loc0128><loc0768><loc0896>", "<loc0000><loc0512><loc0102><loc1023>"

Say = Callable[..., list[Any]]


def segs(codes: list[int]) -> str:
    return "".join(f"<seg{code:03d}>" for code in codes)


CIRCLE, SQUARE = f"{BOX}{segs(CODES)} blue circle", f"{OTHER_BOX}{segs(OTHER_CODES)} red"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The demo checkpoint with random weights for masks; it has not learned to segment."""
    folder = tmp_path_factory.mktemp("segment")
    export(str(DEMO_CHECKPOINT), folder / "out", ExportOptions(mask_decoder=save_weights(folder / "masks.npz")))
    with pgfast.load(folder / "out", provider="cpu") as engine:
        yield engine


@pytest.fixture
def say(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Makes the model of an engine write a text, each token with the log-probability -0.01; returns what it is asked."""

    def saying(*objects: str, by: Engine = engine) -> list[Any]:
        asked: list[Any] = []
        # the separator by hand: this tokenizer may not have it
        ids = [id for text in objects for id in by._tokenizer.encode_suffix(text, locations=True)] + [by.manifest.tokens.eos]

        class Pending:
            def result(self) -> Answer:
                scores, text = (-0.01,) * len(ids), by._tokenizer.decode(ids)
                return Answer(text, 0.5, tuple(ids), scores, "stop", None, Timings(0, 0, 0, 0, 0, 0))

        def submit(image: Any, *, prompt: str, options: GenerateOptions | None) -> Pending:
            asked.append((prompt, options))
            return Pending()

        monkeypatch.setattr(by, "submit", submit)
        monkeypatch.setattr(pgfast, "load", lambda *_args, **_options: by)
        return asked

    return saying


def expected(engine: Engine, codes: list[int], box: tuple[int, int, int, int], width: int, height: int) -> np.ndarray:
    """The reference's way: the graph's numbers, Pillow's bilinear resize to the box, above 0."""
    path = engine._bundle.folder / "mask_decoder.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    small = session.run(None, {"codes": np.array([codes])})[0][0]
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = np.asarray(Image.fromarray(small).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)) > 0
    return mask


# ---- the engine


def test_masks_are_of_the_picture_given(engine: Engine, say: Say) -> None:
    asked = say(CIRCLE, SQUARE)
    options = GenerateOptions(max_new_tokens=60)
    found = engine.segment(np.zeros((300, 800, 3), np.uint8), ["blue circle", "red"], options=options)
    assert asked == [("segment blue circle ; red", options)]
    assert isinstance(found, Segments)
    assert (found.width, found.height, found.problems) == (800, 300, ())
    circle, square = found
    assert (circle.label, circle.box) == ("blue circle", (100, 75, 700, 225))
    assert square.box == (400, 0, 1023 / 1024 * 800, 102 / 1024 * 300)
    assert circle.score == pytest.approx(math.exp(-0.01 * 6))  # the codes do not count
    for segment, codes, box in ((circle, CODES, (100, 75, 700, 225)), (square, OTHER_CODES, (400, 0, 799, 30))):
        assert segment.mask is not None
        assert (segment.mask.dtype, segment.mask.shape) == (np.bool_, (300, 800))
        assert segment.mask.any()
        np.testing.assert_array_equal(segment.mask, expected(engine, codes, box, 800, 300))


def test_masks_are_of_the_upright_picture(engine: Engine, say: Say, tmp_path: Path) -> None:
    say(CIRCLE)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (800, 300)).save(path, exif=exif)
    for image in (path, engine.encode_image(path)):
        (segment,) = engine.segment(image, "blue circle")
        assert segment.mask is not None
        np.testing.assert_array_equal(segment.mask, expected(engine, CODES, (38, 200, 262, 600), 300, 800))


@pytest.mark.parametrize(
    ("codes", "problem"),
    [
        (CODES[:15], "object 1 ('red') has 15 of 16 segment codes: its box has no mask"),
        ([*CODES, 3], "object 1 ('red') has 17 of 16 segment codes: its box has no mask"),
        ([], "object 1 ('red') has 0 of 16 segment codes: its box has no mask"),
    ],
)
def test_a_box_without_its_sixteen_codes_is_kept(codes: list[int], problem: str, engine: Engine, say: Say) -> None:
    say(f"{BOX}{segs(codes)} red", CIRCLE)
    found = engine.segment(BLUE, ["red", "blue circle"])
    assert [(segment.label, segment.mask is None) for segment in found] == [("red", True), ("blue circle", False)]
    assert found.problems == (problem,)
    np.testing.assert_array_equal(found[1].mask, expected(engine, CODES, (80, 160, 560, 480), 640, 640))


def test_a_box_that_covers_no_pixel_has_an_empty_mask(engine: Engine, say: Say) -> None:
    say(f"<loc0100><loc0100><loc0110><loc0110>{segs(CODES)} red")
    (segment,) = engine.segment(np.zeros((20, 20, 3), np.uint8), "red")
    assert segment.mask is not None
    assert segment.mask.shape == (20, 20)
    assert not segment.mask.any()


def test_without_a_mask_decoder_there_are_boxes(demo: Engine, say: Say) -> None:
    say(CIRCLE, by=demo)
    found = demo.segment(BLUE, "blue circle")
    assert [(segment.label, segment.box, segment.mask) for segment in found] == [("blue circle", (80, 160, 560, 480), None)]
    assert found.problems == ()


def test_what_the_model_writes_is_what_is_read(engine: Engine) -> None:
    """No stand-in: whatever the demo model says to the prompt."""
    found = engine.segment(BLUE, "circle")
    assert found.answer.token_ids == engine.generate(BLUE, "segment circle").token_ids
    assert all(segment.mask is None or segment.mask.shape == (640, 640) for segment in found)


def test_what_cannot_be_asked(engine: Engine) -> None:
    with pytest.raises(PromptError, match="a label is empty"):
        engine.segment(BLUE, "")
    one = engine.encode_image(BLUE)
    several = pgfast.EncodedImage(np.concatenate([one.image_features] * 2, axis=1), 640, 640, one.bundle_id)
    with pytest.raises(InputError, match="segment takes one picture"):
        engine.segment(several, "circle")


def test_the_drawing_has_masks_under_boxes(engine: Engine, say: Say) -> None:
    say(CIRCLE, SQUARE, f"{OTHER_BOX} red")
    picture = Image.open(BLUE).convert("RGB")
    found, before = engine.segment(picture, ["blue circle", "red"]), np.asarray(picture)
    drawn = np.asarray(draw_segments(picture, found))
    np.testing.assert_array_equal(np.asarray(picture), before)
    plain = np.asarray(draw_detections(picture, found))
    lines = (plain != before).any(axis=2)
    np.testing.assert_array_equal(drawn[lines], plain[lines])
    masks = [segment.mask for segment in found if segment.mask is not None]
    nothing = ~(lines | masks[0] | masks[1])
    np.testing.assert_array_equal(drawn[nothing], before[nothing])
    for i, label in enumerate(("blue circle", "red")):
        alone = masks[i] & ~masks[1 - i] & ~lines
        wanted = (before[alone].astype(float) + np.array(label_colors(["blue circle", "red"])[label])) / 2
        assert alone.sum() > 1000
        assert np.abs(drawn[alone] - wanted).max() <= 0.5


# ---- the command


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, list[str]]:
    """Returns stdout and the lines of stderr after the first, which says what answers."""
    with pytest.raises(SystemExit) as caught:
        main(["segment", *args])
    out, err = capsys.readouterr()
    assert caught.value.code == code, err
    return out, [line for line in err.splitlines() if not line.endswith(", on cpu")]


def test_text_for_people(capsys: pytest.CaptureFixture[str], engine: Engine, say: Say) -> None:
    asked = say(CIRCLE, f"{OTHER_BOX} red")
    pixels = expected(engine, CODES, (80, 160, 560, 480), 640, 640).sum()
    out, err = run(capsys, BLUE, "blue circle", "red")
    assert out.splitlines() == [
        f"blue circle: x 80 to 560, y 160 to 480, score 0.94, mask of {pixels} pixels",
        "red: x 320 to 639.4, y 0 to 63.8, score 0.95, no mask",
    ]
    assert err == ["pgfast: object 2 ('red') has 0 of 16 segment codes: its box has no mask"]
    assert [prompt for prompt, _ in asked] == ["segment blue circle ; red"]
    say()
    assert run(capsys, BLUE, "red") == ("", ["pgfast: nothing found"])


def test_json(capsys: pytest.CaptureFixture[str], engine: Engine, say: Say) -> None:
    say(CIRCLE, f"{OTHER_BOX} red")
    document = json.loads(run(capsys, BLUE, "blue circle", "red", "--json")[0])
    assert (document["width"], document["height"]) == (640, 640)
    circle, red = document["segments"]
    assert (circle["label"], circle["box"]) == ("blue circle", [80, 160, 560, 480])
    assert circle["score"] == pytest.approx(math.exp(-0.06))
    assert circle["mask"]["size"] == [640, 640]
    assert coco_mask.area(circle["mask"]) == expected(engine, CODES, (80, 160, 560, 480), 640, 640).sum()
    assert red["mask"] is None
    assert len(document["problems"]) == 1
    assert document["answer"]["finish_reason"] == "stop"
    again = json.loads(run(capsys, BLUE, "blue circle", "red", "--format", "json")[0])
    assert again["segments"] == document["segments"]
    _, err = run(capsys, BLUE, "a", "--json", "--format", "coco", code=2)
    assert err == ["pgfast: error: --json and --format coco exclude each other"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools' decode
def test_coco_is_read_by_its_own_program(capsys: pytest.CaptureFixture[str], engine: Engine, say: Say, tmp_path: Path) -> None:
    say(CIRCLE, f"{OTHER_BOX} red")
    path = tmp_path / "coco.json"
    path.write_text(run(capsys, BLUE, "red", "blue circle", "--format", "coco")[0])
    coco = COCO(path)
    circle, red = coco.loadAnns(coco.getAnnIds())
    assert coco.loadCats(circle["category_id"])[0]["name"] == "blue circle"
    mask = expected(engine, CODES, (80, 160, 560, 480), 640, 640)
    np.testing.assert_array_equal(coco.annToMask(circle), mask)
    assert (circle["area"], circle["bbox"]) == (mask.sum(), [80, 160, 480, 320])
    assert "segmentation" not in red
    assert red["area"] == pytest.approx((639.375 - 320) * 63.75)


def test_the_overlay(capsys: pytest.CaptureFixture[str], engine: Engine, say: Say, tmp_path: Path) -> None:
    say(CIRCLE)
    path = tmp_path / "out.png"
    out, err = run(capsys, BLUE, "blue circle", "-o", str(path))
    assert out.startswith("blue circle: x 80")
    assert err == [f"pgfast: drawn into {path}"]
    with Image.open(path) as drawing:
        found = engine.segment(BLUE, "blue circle")
        wanted = draw_segments(Image.open(BLUE).convert("RGB"), found)
        np.testing.assert_array_equal(np.asarray(drawing), np.asarray(wanted))


def test_a_bundle_without_masks_says_how_to_get_them(
    capsys: pytest.CaptureFixture[str], demo: Engine, say: Say, tmp_path: Path
) -> None:
    say(CIRCLE, by=demo)
    out, err = run(capsys, BLUE, "blue circle", "-o", str(tmp_path / "out.png"))
    assert out == "blue circle: x 80 to 560, y 160 to 480, score 0.94, no mask\n"
    assert len(err) == 2
    assert "no mask decoder, so boxes come without masks: 'pgfast export BUNDLE NEW_BUNDLE --mask-decoder" in err[0]
    assert (tmp_path / "out.png").exists()
    assert json.loads(run(capsys, BLUE, "blue circle", "--json")[0])["segments"][0]["mask"] is None


def test_a_picture_from_stdin(capsys: pytest.CaptureFixture[str], say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    say(CIRCLE)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(BLUE).read_bytes())))
    document = json.loads(run(capsys, "-", "blue circle", "--format", "coco")[0])
    assert document["images"][0]["file_name"] == "-"


def test_a_drawing_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgfast, "load", lambda *_args, **_options: pytest.fail("loaded"))
    for args, message in (([BLUE, "a", "-o", "out.svg"], "out.svg: the ending says"), ([BLUE, ""], "a label is empty")):
        out, err = run(capsys, *args, code=2)
        assert out == ""
        assert len(err) == 1
        assert err[0].startswith(f"pgfast: error: {message}")
