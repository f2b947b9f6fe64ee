"""Calibration error, the temperature that makes it smaller, and its way into the bundle."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from memory_dataset import Memory, easy_slice, one
from pgfast.train.data import sources
from pgfast.train.evaluation import calibration as evaluation
from pgfast.train.evaluation.calibration import Outcome, fit, fit_temperature, is_held_out, reliability, store

from pgfast.bundle import Bundle
from pgfast.calibration import calibrate, log_odds
from pgfast.cli import main
from pgfast.errors import BundleError, InputError
from pgfast.loading import demo_bundle
from pgfast.manifest import Calibration, Manifest

confidences = st.floats(0, 1)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The demo bundle, to write into, without a calibration."""
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle(), folder)
    manifest = dataclasses.replace(Bundle.open(folder).manifest, calibration=None)
    (folder / "pgfast.json").write_text(manifest.to_json())
    return folder


# ---- the formulas


def test_calibration_error_of_an_example_by_hand() -> None:
    """Two bins of 15: of 0.95, 0.99, 1.0 two are right; of 0.35, 0.39 half of one is."""
    found = reliability([0.95, 0.99, 1.0, 0.35, 0.39], [1, 1, 0, 0, 0.5])
    assert found.ece == pytest.approx(3 / 5 * (2.94 / 3 - 2 / 3) + 2 / 5 * (0.37 - 0.25))
    assert [(b.low, b.high, b.count) for b in found.bins] == [(5 / 15, 6 / 15, 2), (14 / 15, 1.0, 3)]
    assert [b.confidence for b in found.bins] == pytest.approx([0.37, 0.98])
    assert [b.accuracy for b in found.bins] == pytest.approx([0.25, 2 / 3])


def test_edges_belong_to_the_bin_below() -> None:
    bins = reliability([0.0, 0.2, 0.2 + 1e-9, 0.4, 1.0], [0, 0, 0, 0, 1]).bins
    assert [(round(15 * b.low), b.count) for b in bins] == [(0, 1), (2, 1), (3, 1), (5, 1), (14, 1)]


@given(st.lists(st.tuples(confidences, st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])), min_size=1, max_size=40))
def test_calibration_error_is_the_published_sum(answers: list[tuple[float, float]]) -> None:
    """Guo et al. 2017, equation 3, bin by bin as it is written there."""
    assume(all(abs(c * 15 - round(c * 15)) > 1e-9 for c, _ in answers))  # there a rounding decides
    ece = 0.0
    for m in range(1, 16):
        bin_m = [(c, a) for c, a in answers if (m - 1) / 15 < c <= m / 15]
        if bin_m:
            gap = sum(a for _, a in bin_m) / len(bin_m) - sum(c for c, _ in bin_m) / len(bin_m)
            ece += len(bin_m) / len(answers) * abs(gap)
    assert reliability(*map(list, zip(*answers, strict=True))).ece == pytest.approx(ece, abs=1e-12)


@given(confidences, st.floats(0.01, 100))
def test_the_temperature_acts_on_the_log_odds(confidence: float, temperature: float) -> None:
    found = calibrate(confidence, temperature)
    assert 0 <= found <= 1
    if 1e-6 < confidence < 1 - 1e-6 and abs(log_odds(confidence) / temperature) < 600:  # no further: it would overflow
        odds = (confidence / (1 - confidence)) ** (1 / temperature)  # another form of the same
        assert found == pytest.approx(1 / (1 + 1 / odds), rel=1e-6, abs=1e-300)
        assert calibrate(confidence, 1.0) == pytest.approx(confidence, rel=1e-6)
    assert (found > 0.5) == (log_odds(confidence) > 0) or found == 0.5


@given(confidences, confidences, st.floats(0.01, 100))
def test_calibration_keeps_the_order(one: float, other: float, temperature: float) -> None:
    low, high = sorted((one, other))
    assert calibrate(low, temperature) <= calibrate(high, temperature)


def simulated(count: int, temperature: float, seed: int) -> list[Outcome]:
    """Answers whose chance to be right is the confidence after the temperature."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(2, 3, count)
    right = rng.random(count) < 1 / (1 + np.exp(-odds / temperature))
    return [Outcome(f"{i}.png", 1 / (1 + math.exp(-z)), float(a)) for i, (z, a) in enumerate(zip(odds, right, strict=True))]


def likelihood(outcomes: list[Outcome], temperature: float) -> float:
    """Mean negative log-likelihood of the accuracies."""
    odds = np.array([math.log(o.confidence / (1 - o.confidence)) for o in outcomes]) / temperature
    accuracy = np.array([o.accuracy for o in outcomes])
    return float(np.mean(accuracy * np.logaddexp(0, -odds) + (1 - accuracy) * np.logaddexp(0, odds)))


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_best_of_a_grid_and_near_the_true_one(true: float) -> None:
    outcomes = [dataclasses.replace(o, accuracy=o.accuracy * 0.9) for o in simulated(500, true, 1)]  # people disagree
    grid = np.geomspace(0.1, 20, 1001)
    best = grid[int(np.argmin([likelihood(outcomes, t) for t in grid]))]
    assert fit_temperature(outcomes) == pytest.approx(best, rel=6e-3)
    assert fit_temperature(simulated(20000, true, 2)) == pytest.approx(true, rel=0.1)


def test_no_temperature_fits_when_there_is_nothing_to_learn() -> None:
    surely_right = [Outcome("a", 0.9, 1.0), Outcome("b", 0.99, 1.0)]
    upside_down = [Outcome("a", 0.9, 0.0), Outcome("b", 0.1, 1.0)]
    for outcomes in (surely_right, upside_down):
        with pytest.raises(InputError, match="no temperature fits"):
            fit_temperature(outcomes)
    assert fit_temperature([Outcome("a", 1.0, 1.0), Outcome("b", 1.0, 0.0), Outcome("c", 0.0, 0.3), Outcome("d", 0.9, 1.0)]) > 1


def test_figures_are_from_pictures_that_the_temperature_has_not_seen() -> None:
    """Answers about the other half may be anything: they move the figures, and the temperature not."""
    outcomes = simulated(3000, 3.0, 5)
    calibration, found = fit(outcomes)
    seen = [o for o in outcomes if not is_held_out(o.picture)]
    held_out = [o for o in outcomes if is_held_out(o.picture)]
    assert 1300 < len(seen) < 1700
    assert calibration.temperature == fit_temperature(seen)
    assert (calibration.questions, found.fitted_on) == (len(held_out), len(seen))
    before = reliability([o.confidence for o in held_out], [o.accuracy for o in held_out]).ece
    odds = np.array([math.log(o.confidence / (1 - o.confidence)) for o in held_out]) / calibration.temperature
    after = reliability((1 / (1 + np.exp(-odds))).tolist(), [o.accuracy for o in held_out]).ece
    assert (calibration.ece_before, calibration.ece_after) == pytest.approx((before, after))
    assert after < before / 3
    turned = [dataclasses.replace(o, accuracy=1 - o.accuracy) if is_held_out(o.picture) else o for o in outcomes]
    assert fit(turned)[0].temperature == calibration.temperature
    assert fit(turned)[0].ece_after > 5 * after


def test_a_picture_is_in_the_same_half_wherever_its_folder_lies() -> None:
    names = [f"{i:05}.png" for i in range(50)]
    assert [is_held_out(f"/a/{name}") for name in names] == [is_held_out(f"/b/c/{name}") for name in names]
    assert len({is_held_out(name) for name in names}) == 2
    is_held_out("\udcff.png")
    with pytest.raises(InputError, match="needs 100 scored answers about each half of the pictures, there are"):
        fit([Outcome("one.png", 0.9, i % 2) for i in range(500)])


# ---- through the command and the bundle


@pytest.fixture(scope="module")
def noisy() -> Memory:
    """easy-VQA under noise: the demo model is wrong at times, and too sure."""
    easy, rng = easy_slice(), np.random.default_rng(1)
    shown = {
        name: np.clip(image + rng.normal(0, 40, image.shape), 0, 255).astype(np.uint8) for name, image in easy.pictures.items()
    }
    return Memory(easy.records, shown, "noise")


def test_the_command_fits_stores_and_reports(
    noisy: Memory, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "open_dataset", lambda *_, **__: noisy)
    before = Bundle.open(copy).manifest
    out = tmp_path / "out"
    code, printed, err = run(capsys, "eval", str(copy), "spec", "--provider", "cpu", "--calibrate", "-o", str(out))
    assert code == 0, err
    after = Bundle.open(copy, full_check=True).manifest
    assert after.calibration is not None
    assert dataclasses.replace(after, calibration=None) == before
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in demo_bundle().iterdir())
    assert (copy / "pgfast.json").stat().st_mode == (demo_bundle() / "pgfast.json").stat().st_mode
    lines = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    outcomes = [Outcome(line["picture"], line["confidence"], line["accuracy"]) for line in lines]
    calibration, found = fit(outcomes)
    assert after.calibration == calibration
    assert calibration.ece_after < calibration.ece_before
    assert json.loads((out / "summary.json").read_text())["confidence"] == json.loads(json.dumps(dataclasses.asdict(found)))
    errors = [float(value) for value in re.findall(r"calibration error.*: (\d+\.\d\d) \(\d+ answers, none of the", printed)]
    assert errors == pytest.approx([100 * calibration.ece_before, 100 * calibration.ece_after], abs=0.005)
    assert f"the temperature {calibration.temperature:.4g} is in" in err
    assert f"temperature {calibration.temperature:.4g}" in run(capsys, "inspect", str(copy))[1]

    code, printed, err = run(capsys, "eval", str(copy), "spec", "--provider", "cpu", "--json", "--limit", "50")
    again = json.loads(printed)["confidence"]
    assert (again["temperature"], again["questions"], again["fitted_on"]) == (calibration.temperature, 50, None)
    accuracies = [line["accuracy"] for line in lines[:50]]
    shown = reliability([calibrate(line["confidence"], calibration.temperature) for line in lines[:50]], accuracies)
    assert again["calibrated"]["ece"] == pytest.approx(shown.ece, abs=1e-4)


def test_what_cannot_be_calibrated_is_refused_after_its_report(
    noisy: Memory, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "open_dataset", lambda *_, **__: noisy)
    untouched = (copy / "pgfast.json").read_bytes()
    out = tmp_path / "out"
    args = ["eval", str(copy), "spec", "--provider", "cpu", "--calibrate", "--limit", "40"]
    code, printed, err = run(capsys, *args, "-o", str(out))
    assert code == 2
    assert "needs 100 scored answers" in err.splitlines()[-1]
    assert "expected calibration error: " in printed
    assert (out / "summary.json").exists()
    assert (copy / "pgfast.json").read_bytes() == untouched
    monkeypatch.setattr(evaluation.os, "access", lambda path, mode: path != copy)  # root may write anywhere
    assert "cannot be written" in run(capsys, *args)[2]
    assert "is stored in a bundle: export it first" in run(capsys, "eval", str(tmp_path), "spec", "--calibrate")[2]


def test_a_report_without_scores_says_nothing_of_confidence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Memory([one(1, "x", "is there a circle?", ())], {"x": np.zeros((8, 8, 3), np.uint8)})
    monkeypatch.setattr(sources, "open_dataset", lambda *_, **__: data)
    code, printed, _ = run(capsys, "eval", str(demo_bundle()), "spec", "--provider", "cpu")
    assert code == 0
    assert "calibration" not in printed
    assert json.loads(run(capsys, "eval", str(demo_bundle()), "spec", "--json")[1])["confidence"] is None


CALIBRATION = Calibration(3.5, 0.1, 0.05, 200)


def test_storing_is_all_or_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(copy).manifest
    names = {path.name for path in copy.iterdir()}
    with pytest.raises(BundleError, match="was changed while it was measured"):
        store(copy, "another", CALIBRATION)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(BundleError, match=r"pgfast.json cannot be written: No space left"):
            store(copy, manifest.digest(), CALIBRATION)
    assert Bundle.open(copy).manifest == manifest
    store(copy, manifest.digest(), CALIBRATION)
    store(copy, manifest.digest(), dataclasses.replace(CALIBRATION, temperature=2.0))
    assert Bundle.open(copy).manifest == dataclasses.replace(manifest, calibration=Calibration(2.0, 0.1, 0.05, 200))
    assert {path.name for path in copy.iterdir()} == names


@pytest.mark.parametrize("temperature", [0, -1, 1e-3, 1000, float("nan"), "2", None])
def test_a_temperature_that_no_fit_gives_is_refused(temperature: Any) -> None:
    raw = json.loads((demo_bundle() / "pgfast.json").read_text())
    raw["calibration"] = dataclasses.asdict(CALIBRATION) | {"temperature": temperature}
    with pytest.raises(BundleError):
        Manifest.from_json(json.dumps(raw))
