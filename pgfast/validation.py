"""What callers may ask for: options and choices, checked before any work starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pgfast.errors import InputError
from pgfast.types import GenerateOptions

_TINY = 1e-9
_RANGES = {"top_p": (_TINY, 1.0), "repetition_penalty": (_TINY, 1e9), "length_penalty": (-100.0, 100.0)}


def check_options(options: GenerateOptions | None, most: int) -> GenerateOptions:
    """Return the options, or the defaults for None.

    Args:
        options: What the caller gave.
        most: The bundle's limit of new tokens.

    Raises:
        InputError: A value has the wrong type or lies out of range; the message names it.
    """
    if options is None:
        return GenerateOptions()
    if not isinstance(options, GenerateOptions):
        raise InputError(f"options is a GenerateOptions, not {type(options).__name__}")
    o = options
    for name, value, low, high in (
        ("max_new_tokens", most if o.max_new_tokens is None else o.max_new_tokens, 1, most),
        ("top_k", o.top_k, 0, 2**31),
        ("seed", 0 if o.seed is None else o.seed, 0, 2**63),
        ("beams", o.beams, 1, 2**31),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{name} is {value!r}: a whole number from {low} to {high} is needed")
    for name, number, good in (
        ("temperature", o.temperature, "0 or more"),
        ("top_p", o.top_p, "above 0 and at most 1"),
        ("repetition_penalty", o.repetition_penalty, "above 0"),
        ("length_penalty", o.length_penalty, "from -100 to 100"),
    ):
        fine = isinstance(number, int | float) and math.isfinite(number)
        least, most_of = _RANGES.get(name, (0.0, math.inf))
        if not fine or not least <= number <= most_of:
            raise InputError(f"{name} is {number!r}: a number {good} is needed")
    if o.beams > 1 and o.temperature > 0:
        raise InputError("beams search for the most probable text: leave temperature away, or do not use beams")
    wanted = o.min_confidence
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 <= wanted <= 1):
        raise InputError(f"min_confidence is {wanted!r}: a number from 0 to 1 is needed")
    check_texts("stop", o.stop)
    return options


def check_stream(options: GenerateOptions | None) -> None:
    """Refuse to stream what only the whole answer decides.

    Raises:
        InputError: There is a `min_confidence`, or there are beams.
    """
    if options is not None and options.beams > 1:
        raise InputError("with beams nothing is certain before the end: do not stream")
    if options is not None and options.min_confidence is not None:
        raise InputError("a stream cannot take a piece back that is out: leave min_confidence away, or do not stream")


def check_texts(name: str, texts: Any) -> Sequence[str]:
    """Make sure of a sequence of non-empty texts; a text alone would be taken letter by letter."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} is a list of texts, not {type(texts).__name__}")
    if any(not text.strip() if name == "choices" else not text for text in texts):
        raise InputError(f"{name} has an empty text")
    return texts
