"""How far confidence and accuracy are apart, and the temperature that brings them together.

Expected calibration error as in Guo et al. 2017, "On Calibration of Modern Neural Networks": the mean over all answers of
|accuracy - confidence| of the answer's bin, with bins (0, 1/15], (1/15, 2/15], ... of confidence. Accuracy is a soft label:
people may disagree, then an answer is right to a part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.calibration import calibrate, log_odds
from pgfast.errors import BundleError, InputError
from pgfast.manifest import MANIFEST, Calibration

BINS = 15
LEAST = 100
"""Answers in each half, below which figures would be chance."""
LOWEST, HIGHEST = 0.01, 100.0
"""Temperatures that a manifest may have."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer to a question that has a reference."""

    picture: str
    confidence: float
    accuracy: float
    """0 to 1."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers of about the same confidence."""

    low: float
    """Above this."""
    high: float
    """Up to this."""
    count: int
    confidence: float
    """Their mean."""
    accuracy: float
    """Their mean."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """What confidence is worth."""

    ece: float
    """Expected calibration error, 0 to 1."""
    bins: tuple[Bin, ...]
    """Those that hold an answer."""


@dataclass(frozen=True, slots=True)
class ConfidenceReport:
    """What a summary says about confidence."""

    questions: int
    plain: Reliability
    """Of the confidence as it is."""
    temperature: float | None = None
    """The bundle's; None: it has none."""
    calibrated: Reliability | None = None
    """Of the confidence with the temperature."""
    fitted_on: int | None = None
    """Answers that the temperature was just fitted to, none of them among `questions`; None: it was there before."""


def reliability(confidences: Sequence[float], accuracies: Sequence[float]) -> Reliability:
    """Bin answers by confidence; there must be one at least."""
    confidence, accuracy = np.array(confidences, np.float64), np.array(accuracies, np.float64)
    places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # [answers]; 0 belongs to the first bin
    bins, ece = list[Bin](), 0.0
    for place in np.unique(places):
        inside = places == place
        mean, right = float(confidence[inside].mean()), float(accuracy[inside].mean())
        bins.append(Bin(int(place) / BINS, (int(place) + 1) / BINS, int(inside.sum()), mean, right))
        ece += float(inside.mean()) * abs(right - mean)
    return Reliability(ece, tuple(bins))


def report(outcomes: Sequence[Outcome], temperature: float | None, fitted_on: int | None = None) -> ConfidenceReport | None:
    """Say what the confidence of answers is worth; None without answers."""
    if not outcomes:
        return None
    confidences, accuracies = [o.confidence for o in outcomes], [o.accuracy for o in outcomes]
    plain = reliability(confidences, accuracies)
    if temperature is None:
        return ConfidenceReport(len(outcomes), plain)
    calibrated = reliability([calibrate(c, temperature) for c in confidences], accuracies)
    return ConfidenceReport(len(outcomes), plain, temperature, calibrated, fitted_on)


def fit_temperature(outcomes: Iterable[Outcome]) -> float:
    """Find the temperature under which the answers' accuracies are most likely.

    It minimises the mean of -(a ln q + (1 - a) ln(1 - q)), where a is an answer's accuracy and q its confidence after the
    temperature. That is convex in 1 / T, so its slope is halved in until it is 0.

    Raises:
        InputError: No temperature from 0.01 to 100 is best.
    """
    pairs = [(log_odds(o.confidence), o.accuracy) for o in outcomes]
    odds, accuracy = (np.array(values, np.float64) for values in zip(*pairs, strict=True))
    low, high = 1 / HIGHEST, 1 / LOWEST  # of 1 / T
    if _slope(odds, accuracy, low) >= 0 or _slope(odds, accuracy, high) <= 0:
        raise InputError(
            "no temperature fits: all answers are right, or the confident ones are right no more often than the others; "
            "take more or harder questions"
        )
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(odds, accuracy, middle) < 0 else (low, middle)
    return 2 / (low + high)


def _slope(odds: NDArray[np.float64], accuracy: NDArray[np.float64], inverse: float) -> float:
    """Slope of the mean negative log-likelihood over 1 / T."""
    chance = 0.5 * (1 + np.tanh(0.5 * inverse * odds))  # the logistic function, which cannot overflow this way
    return float(np.mean(odds * (chance - accuracy)))


def is_held_out(picture: str) -> bool:
    """Whether questions about a picture measure the temperature rather than make it: by the file's name, wherever it lies."""
    name = os.path.basename(picture).encode("utf-8", "surrogatepass")
    return bool(hashlib.sha256(name).digest()[0] & 1)


def fit(outcomes: Sequence[Outcome]) -> tuple[Calibration, ConfidenceReport]:
    """Fit a temperature on the answers about half of the pictures, and measure it on the others.

    Raises:
        InputError: There are too few answers, or no temperature fits.
    """
    made = [outcome for outcome in outcomes if not is_held_out(outcome.picture)]
    measured = [outcome for outcome in outcomes if is_held_out(outcome.picture)]
    if min(len(made), len(measured)) < LEAST:
        raise InputError(
            f"a calibration needs {LEAST} scored answers about each half of the pictures, "
            f"there are {len(made)} and {len(measured)}: take more questions"
        )
    temperature = fit_temperature(made)
    found = report(measured, temperature, len(made))
    assert found is not None
    assert found.calibrated is not None
    return Calibration(temperature, found.plain.ece, found.calibrated.ece, found.questions), found


def check_writable(folder: Path) -> None:
    """Refuse a bundle that cannot be written to, before hours of answering.

    Raises:
        BundleError: It is not writable.
    """
    if not os.access(folder, os.W_OK):
        raise BundleError(f"{folder} cannot be written: copy the bundle to a place where its calibration can be stored")


def store(folder: Path, digest: str, calibration: Calibration) -> None:
    """Write a calibration into a bundle's manifest, in one step.

    Args:
        folder: The bundle.
        digest: `Manifest.digest` of the bundle that was measured.
        calibration: What replaces the one that is there.

    Raises:
        BundleError: The bundle is another by now, or cannot be written.
    """
    manifest = Bundle.open(folder).manifest
    if manifest.digest() != digest:
        raise BundleError(f"{folder} was changed while it was measured: run the same command again")
    partial = folder / f".{MANIFEST}.partial-{os.getpid()}"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(dataclasses.replace(manifest, calibration=calibration).to_json())
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(folder / MANIFEST, partial)
        os.replace(partial, folder / MANIFEST)
    except OSError as error:
        raise BundleError(f"{folder / MANIFEST} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
