"""`Engine.detect` and `pgfast detect`; where the model's words are chosen, everything but the decoder is real."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import pgfast
from pgfast.cli import main
from pgfast.engine import Engine
from pgfast.errors import ImageError, InputError, PromptError
from pgfast.loading import demo_bundle
from pgfast.types import Answer, Detections, GenerateOptions, Timings

BLUE = str(demo_bundle().parent / "blue_circle.png")  # 640 x 640
CIRCLE = "<loc0256><loc0128><loc0768><loc0896> blue circle"
SQUARE = "<loc0000><loc0512><loc0102><loc1023> red"

Say = Callable[..., list[Any]]


@pytest.fixture
def say(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Makes the model write a text, each token with the log-probability -0.25; returns what it is asked."""

    def saying(*objects: str, finish: Literal["stop", "length"] = "stop") -> list[Any]:
        asked: list[Any] = []
        tokenizer, end = demo._tokenizer, [demo.manifest.tokens.eos] if finish == "stop" else []
        # the separator by hand: this tokenizer may not have it
        ids = [id for text in objects for id in tokenizer.encode_suffix(text, locations=True)] + end

        class Pending:
            def result(self) -> Answer:
                scores = (-0.25,) * len(ids)
                return Answer(tokenizer.decode(ids), 0.5, tuple(ids), scores, finish, None, Timings(0, 0, 0, 0, 0, 0))

        def submit(image: Any, *, prompt: str, options: GenerateOptions | None) -> Pending:
            asked.append((image, prompt, options))
            return Pending()

        monkeypatch.setattr(demo, "submit", submit)
        monkeypatch.setattr(pgfast, "load", lambda *_args, **_options: demo)
        return asked

    return saying


def boxes(found: Sequence[Any]) -> list[tuple[str, tuple[float, ...]]]:
    return [(detection.label, detection.box) for detection in found]


# ---- the engine


def test_boxes_are_in_pixels_of_the_picture(demo: Engine, say: Say) -> None:
    asked = say(CIRCLE, SQUARE)
    options = GenerateOptions(max_new_tokens=50)
    found = demo.detect(np.zeros((300, 800, 3), np.uint8), "blue circle ; red", options=options)
    assert boxes(found) == [
        ("blue circle", (128 / 1024 * 800, 256 / 1024 * 300, 896 / 1024 * 800, 768 / 1024 * 300)),
        ("red", (512 / 1024 * 800, 0, 1023 / 1024 * 800, 102 / 1024 * 300)),
    ]
    assert [d.score for d in found] == [pytest.approx(math.exp(-0.25 * 6)), pytest.approx(math.exp(-0.25 * 5))]
    assert (found.width, found.height, found.problems) == (800, 300, ())
    assert found.answer.text.endswith("red")
    assert isinstance(found, Detections)
    assert [(prompt, given) for _, prompt, given in asked] == [("detect blue circle ; red", options)]


def test_boxes_are_in_the_upright_picture(demo: Engine, say: Say, tmp_path: Path) -> None:
    """A camera that lay on its side: 800 x 300 in the file, 300 x 800 to people."""
    say(CIRCLE)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (800, 300)).save(path, exif=exif)
    for image in (path, str(path), path.read_bytes(), Image.open(path), demo.encode_image(path)):
        found = demo.detect(image, ["blue circle"])
        assert (found.width, found.height) == (300, 800)
        assert boxes(found) == [("blue circle", (128 / 1024 * 300, 256 / 1024 * 800, 896 / 1024 * 300, 768 / 1024 * 800))]


def test_what_the_model_writes_is_what_is_read(demo: Engine) -> None:
    """No stand-in: whatever the demo model says to the prompt."""
    found = demo.detect(BLUE, ["circle", "square"])
    expected = demo.generate(BLUE, "detect circle ; square")
    assert found.answer.token_ids == expected.token_ids
    assert found.answer.text == expected.text
    assert bool(found or found.problems) == bool(expected.text)
    assert all(0 <= d.box[0] < d.box[2] < 640 and 0 <= d.box[1] < d.box[3] < 640 for d in found)


def test_problems_come_with_the_boxes(demo: Engine, say: Say) -> None:
    say("<loc0001><loc0002>", finish="length")
    found = demo.detect(BLUE, ["a", "b"])
    assert list(found) == []
    assert found.problems == (
        "object 1 has 2 of 4 locations and was left out",
        "the answer was cut off after 2 tokens: its end may be wrong, objects may be missing",
    )


def test_the_only_label_is_that_of_boxes_without_one(demo: Engine, say: Say) -> None:
    say(CIRCLE.removesuffix(" blue circle"))
    found = demo.detect(BLUE, " the circle ")
    assert ([d.label for d in found], found.problems) == (["the circle"], ())
    found = demo.detect(BLUE, "circle ; square")
    assert ([d.label for d in found], found.problems) == ([""], ("object 1 has no label",))


def test_an_answer_that_is_unsure_has_no_boxes(demo: Engine) -> None:
    found = demo.detect(BLUE, "circle", options=GenerateOptions(min_confidence=1.0))
    assert (list(found), found.answer.text) == ([], "unsure")
    assert found.problems == ("the answer is less sure than min_confidence: none of its objects are taken",)


def test_the_time_for_the_picture_counts(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = demo.prepare_image
    monkeypatch.setattr(demo, "prepare_image", lambda image: time.sleep(0.05) or prepare(image))
    timings = demo.detect(BLUE, "circle").answer.timings
    assert min(timings.preprocess, timings.ttft, timings.total) >= 0.05
    assert timings.total >= timings.preprocess + timings.vision + timings.prefill + timings.decode


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "a label is empty"),
        ("cat ; ", "a label is empty"),
        ("cat ;; dog", "a label is empty"),
        ([], "a label is empty"),
        (["cat", " "], "a label is empty"),
        (["cat ; dog"], "the label 'cat ; dog' contains ';', which separates labels: give each label alone"),
        (["cat", 3], "labels is a text such as 'cat ; dog', or a list of texts"),
        (3, "labels is a text such as"),
        (None, "labels is a text such as"),
        ("<loc0001> cat", "contains <loc0001>, a marker of the model itself"),
    ],
)
def test_labels_that_cannot_be_asked_for(demo: Engine, labels: Any, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        demo.detect(BLUE, labels)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_picture_at_a_time(demo: Engine) -> None:
    with pytest.raises(ImageError, match="not list"):
        demo.detect([BLUE, BLUE], "circle")
    one = demo.encode_image(BLUE)
    several = pgfast.EncodedImage(np.concatenate([one.image_features] * 2, axis=1), 640, 640, one.bundle_id)
    with pytest.raises(InputError, match="detect takes one picture"):
        demo.detect(several, "circle")


# ---- the command


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, list[str]]:
    """Returns stdout and the lines of stderr after the first, which says what answers."""
    with pytest.raises(SystemExit) as caught:
        main(["detect", *args])
    out, err = capsys.readouterr()
    assert caught.value.code == code, err
    return out, [line for line in err.splitlines() if not line.startswith("pgfast: the embedded demo model")]


def test_text_for_people(capsys: pytest.CaptureFixture[str], say: Say) -> None:
    asked = say(CIRCLE, SQUARE)
    out, err = run(capsys, BLUE, "blue circle", "red")
    assert out == "blue circle: x 80 to 560, y 160 to 480, score 0.22\nred: x 320 to 639.4, y 0 to 63.8, score 0.29\n"
    assert err == []
    run(capsys, BLUE, "blue circle ; red")
    assert [prompt for _, prompt, _ in asked] == ["detect blue circle ; red"] * 2


def test_problems_go_to_stderr(capsys: pytest.CaptureFixture[str], say: Say) -> None:
    say("a", SQUARE, "<loc0001>")
    out, err = run(capsys, BLUE, "a", "red")
    assert out.count("\n") == 1
    assert err == ["pgfast: text without a box: 'a'", "pgfast: object 2 has 1 of 4 locations and was left out"]
    say()
    assert run(capsys, BLUE, "a") == ("", ["pgfast: nothing found"])


def test_boxes_below_a_score_are_left_out(capsys: pytest.CaptureFixture[str], say: Say) -> None:
    say(CIRCLE, SQUARE)
    assert run(capsys, BLUE, "red", "a", "--min-score", "0.25")[0].startswith("red: x 320")
    assert run(capsys, BLUE, "a", "--min-score", "0.5") == ("", ["pgfast: nothing found with a score of 0.5 or more"])
    assert run(capsys, BLUE, "a", "--min-score", "2", code=2)[0] == ""
    for kind in ("json", "coco"):
        document = json.loads(run(capsys, BLUE, "a", "--min-score", "0.25", "--format", kind)[0])
        assert len(document["detections" if kind == "json" else "annotations"]) == 1


def test_json(capsys: pytest.CaptureFixture[str], say: Say) -> None:
    say(CIRCLE, "<loc0001>")
    out, _ = run(capsys, BLUE, "blue circle", "--json")
    document = json.loads(out)
    assert document["detections"] == [
        {"label": "blue circle", "box": [80, 160, 560, 480], "score": pytest.approx(math.exp(-1.5))}
    ]
    assert (document["width"], document["height"]) == (640, 640)
    assert document["problems"] == ["object 2 has 1 of 4 locations and was left out"]
    assert len(document["answer"]["token_ids"]) == 8
    again = json.loads(run(capsys, BLUE, "blue circle", "--format", "json")[0])
    assert all(again[key] == document[key] for key in document if key != "answer")  # which has times
    _, err = run(capsys, BLUE, "a", "--json", "--format", "csv", code=2)
    assert err == ["pgfast: error: --json and --format csv exclude each other"]


def test_coco_is_read_by_its_own_program(capsys: pytest.CaptureFixture[str], say: Say, tmp_path: Path) -> None:
    say(CIRCLE, SQUARE, CIRCLE)
    out, err = run(capsys, BLUE, "red", "cat", "--format", "coco")
    assert err == []
    path = tmp_path / "coco.json"
    path.write_text(out)
    coco = COCO(path)
    (image,) = coco.loadImgs(coco.getImgIds())
    assert (image["file_name"], image["width"], image["height"]) == (BLUE, 640, 640)
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert list(names.values()) == ["red", "cat", "blue circle"]
    found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
    assert [names[annotation["category_id"]] for annotation in found] == ["blue circle", "red", "blue circle"]
    results = coco.loadRes(json.loads(out)["annotations"])
    for annotation in (found[0], results.loadAnns(results.getAnnIds())[0]):
        assert annotation["bbox"] == [80, 160, 480, 320]  # x, y, width, height
        assert annotation["area"] == 480 * 320
        assert annotation["score"] == pytest.approx(math.exp(-1.5))
    assert len(results.getAnnIds(catIds=[3])) == 2
    capsys.readouterr()
    say()
    path.write_text(run(capsys, BLUE, "red", "--format", "coco")[0])
    assert COCO(path).getAnnIds() == []


def test_csv(capsys: pytest.CaptureFixture[str], say: Say) -> None:
    say(CIRCLE, SQUARE)
    out, _ = run(capsys, BLUE, "red", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["image", "label", "x0", "y0", "x1", "y1", "score"]
    assert [(row["image"], row["label"]) for row in rows] == [(BLUE, "blue circle"), (BLUE, "red")]
    assert [float(rows[0][edge]) for edge in ("x0", "y0", "x1", "y1")] == [80, 160, 560, 480]
    assert float(rows[1]["score"]) == pytest.approx(math.exp(-1.25))
    say()
    assert run(capsys, BLUE, "red", "--format", "csv")[0] == "image,label,x0,y0,x1,y1,score\n"


def test_the_drawing(capsys: pytest.CaptureFixture[str], say: Say, tmp_path: Path) -> None:
    say(CIRCLE)
    path = tmp_path / "out.png"
    for _ in range(2):  # a file of that name is replaced
        out, err = run(capsys, BLUE, "blue circle", "-o", str(path))
        assert out.startswith("blue circle: x 80")
        assert err == [f"pgfast: drawn into {path}"]
    before, after = np.asarray(Image.open(BLUE).convert("RGB")), np.asarray(Image.open(path))
    seen = (before != after).any(axis=2)
    assert seen[300, 80:84].all()
    assert not seen[300, 90:550].any()
    assert not seen[:, :80].any()
    assert not seen[490:].any()


def test_a_picture_from_stdin(capsys: pytest.CaptureFixture[str], say: Say, tmp_path: Path, monkeypatch: Any) -> None:
    asked = say(CIRCLE)
    path = tmp_path / "out.jpg"
    for more in ([], ["-o", str(path)]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(BLUE).read_bytes())))
        document = json.loads(run(capsys, "-", "blue circle", "--format", "coco", *more)[0])
        assert document["images"][0] == {"id": 1, "file_name": "-", "width": 640, "height": 640}
    with Image.open(path) as drawing:
        assert (drawing.format, drawing.size) == ("JPEG", (640, 640))
    assert np.array_equal(asked[0][0].pixels, asked[1][0].pixels)


def test_a_drawing_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgfast, "load", lambda *_args, **_options: pytest.fail("loaded"))
    own = tmp_path / "own.png"
    own.write_bytes(Path(BLUE).read_bytes())
    link = tmp_path / "link.png"
    link.symlink_to(own)
    for args, message in (
        ([str(own), "a", "-o", str(own)], f"{own} is the picture itself: choose another name for the drawing"),
        ([str(own), "a", "-o", str(link)], f"{link} is the picture itself: choose another name for the drawing"),
        ([BLUE, "a", "-o", "out.svg"], "out.svg: the ending says the format, one of .png, .jpg"),
        ([BLUE, "a", "b;c"], "the label 'b;c' contains ';'"),
        ([BLUE, ""], "a label is empty"),
    ):
        out, err = run(capsys, *args, code=2)
        assert out == ""
        assert len(err) == 1
        assert err[0].startswith(f"pgfast: error: {message}")
    assert own.read_bytes() == Path(BLUE).read_bytes()


def test_a_name_that_is_not_unicode(capsys: pytest.CaptureFixture[str], say: Say, tmp_path: Path) -> None:
    say(CIRCLE)
    name = str(tmp_path / "caf\udce9.png")
    Path(name).write_bytes(Path(BLUE).read_bytes())
    document = json.loads(run(capsys, name, "a", "--format", "coco")[0])
    assert document["images"][0]["file_name"] == str(tmp_path / "caf\ufffd.png")
