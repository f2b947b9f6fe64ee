"""From the probability of an answer to the chance that it is right: one temperature on the log-odds.

    z(c) = ln(c) - ln(1 - c)
    calibrated(c) = 1 / (1 + exp(-z(c) / T))

T is fitted by `pgfast eval --calibrate`. T = 1 changes nothing, T > 1 pulls towards one half, and the order of answers stays.
"""

from __future__ import annotations

import math

UNSURE = "unsure"
"""The text of an answer below `GenerateOptions.min_confidence`."""
NEAREST = 2.0**-23
"""What is closer to 0 or 1 counts as this close, so log-odds end at 15.94: float32, in which log-probabilities come, tells
nothing closer to 1 from it, and a single long answer with 1e-30 should not decide about T."""


def log_odds(confidence: float) -> float:
    """Return z(c), finite for 0 and 1 too."""
    return math.log(max(confidence, NEAREST)) - math.log(max(1 - confidence, NEAREST))


def calibrate(confidence: float, temperature: float) -> float:
    """Return the calibrated confidence.

    Args:
        confidence: Probability of the answer, 0 to 1.
        temperature: T, above 0.
    """
    odds = log_odds(confidence) / temperature
    return 1 / (1 + math.exp(-odds)) if odds > 0 else math.exp(odds) / (1 + math.exp(odds))
