"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from pgfast.manifest import ImageSpec


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to decode; the defaults are greedy."""

    max_new_tokens: int | None = None
    """Upper bound on generated tokens; None: the bundle's own limit."""
    temperature: float = 0.0
    """0 takes the most probable token each time; above, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Draw only from the most probable tokens that together hold this much probability."""
    top_k: int = 0
    """Draw only from this many most probable tokens; 0: from all."""
    seed: int | None = None
    """The same seed gives the same text, alone or in any batch; None: a new draw each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are cut off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less probable that the prompt or the text holds already (as in transformers); 1: off."""
    beams: int = 1
    """Search with so many beginnings at a time for the most probable text; 1: no search. Not with sampling or streams."""
    length_penalty: float = 1.0
    """With beams: a text's log-probability is divided by its length to this power, so more prefers longer texts."""
    min_confidence: float | None = None
    """An answer that is less certain becomes "unsure" (see `Answer.unsure_of`); None: none does. Not for streams."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent on one question; in `answer_batch` from when its own picture was taken up.

    Other questions share the decoder: prefill and decode are what passed on the clock meanwhile, and waiting for a place
    is in ttft and total only.
    """

    preprocess: float
    """Decoding, resizing, tokenizing."""
    vision: float
    """Vision encoder; 0 when an `EncodedImage` was given, or the picture of an earlier question of the batch."""
    prefill: float
    """The prompt's pass, up to the first token."""
    decode: float
    """All later tokens."""
    ttft: float
    """Up to the first token."""
    total: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated text."""

    text: str
    confidence: float
    """Probability of exactly this answer: the product of its tokens' probabilities under the full softmax."""
    token_ids: tuple[int, ...]
    """Generated ids; the last one is `<eos>` when `finish_reason` is "stop" and no stop text was met."""
    token_logprobs: tuple[float, ...]
    """Natural log-probability of each id, before temperature, top_p, top_k and repetition_penalty."""
    finish_reason: Literal["stop", "length"]
    """"stop": the model ended the answer, or a stop text was met; "length": max_new_tokens was reached."""
    choices: dict[str, float] | None
    """Probability of each choice given that one of them is the answer; None if none were given."""
    timings: Timings
    calibrated: float | None = None
    """Chance that the answer is right: `confidence` with the manifest's calibration; None: the bundle has none."""
    unsure_of: str | None = None
    """What the text was before `min_confidence` made it "unsure"; confidence, tokens and choices are still about this."""


@dataclass(frozen=True, slots=True)
class Detection:
    """An object in a picture."""

    label: str
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the picture as it was given, upright; x0 < x1 and y0 < y1, all inside the picture."""
    score: float
    """Probability that the model writes this box with this label: the product of their tokens' probabilities.

    Four edges and a label are in it, so it is far below what detectors call a score; it ranks boxes of one model.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Segment(Detection):
    """An object in a picture, with its mask; equal ones have equal labels, boxes and scores."""

    mask: NDArray[np.bool_] | None
    """[H, W] of the picture as it was given, upright; None: the model wrote no 16 codes, or the bundle has no mask decoder."""


T = TypeVar("T", bound=Detection)


class Found(list[T]):
    """Objects in the order in which the model named them.

    Args:
        found: The objects.
        answer: The model's text, with its tokens.
        width: Of the picture as it was given, upright, in pixels.
        height: Of that picture.
        problems: What in the text was malformed and what became of it; empty when all is well.
    """

    def __init__(self, found: Iterable[T], *, answer: Answer, width: int, height: int, problems: tuple[str, ...] = ()) -> None:
        super().__init__(found)
        self.answer, self.width, self.height, self.problems = answer, width, height, problems


class Detections(Found[Detection]):
    """What `detect` found."""


class Segments(Found[Segment]):
    """What `segment` found."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """A picture after decoding and resizing, before the vision encoder."""

    pixels: NDArray[np.uint8]
    """[R, R, 3], RGB."""
    width: int
    """Pixels of the picture as it was given."""
    height: int
    spec: ImageSpec
    """How it was resized: a bundle that does it differently refuses it."""


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What an engine has to do at a moment."""

    waiting: int
    """Questions that wait for a place in the running batch."""
    running: int
    slots: int
    """Places in the running batch."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """A picture, or several for one prompt, after the vision encoder, to be asked several questions."""

    image_features: NDArray[np.generic]
    """[1, n * P, D] of n pictures, in the bundle's compute type."""
    width: int
    """Pixels of the (first) picture as it was given."""
    height: int
    bundle_id: str
    """Hash of the vision encoder that made it: another bundle refuses it."""
