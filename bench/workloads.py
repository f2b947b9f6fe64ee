"""What is asked: pictures and prompts that are the same for every contender and new in every round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.errors import InputError, PromptError
from pgfast.manifest import TOKENIZER
from pgfast.prompt import Tokenizer, fill_template

from .contenders import Request

PROMPT_TOKENS = 10
"""`<bos>`, text and newline of the one-row workloads: 266 positions with the 256 image tokens of a 224-pixel model."""
FILLING = "what color is the shape in the image"


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of request."""

    name: str
    title: str
    new_tokens: int
    batch: int = 1
    questions: int = 1
    """More than one: asked one after the other about one picture."""


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("short", "picture + question, 4 new tokens", 4),
        Workload("long", "picture + question, 32 new tokens", 32),
        Workload("questions", "ten questions about one picture, 4 new tokens each", 4, questions=10),
        Workload("batch-1", "batch 1, 32 new tokens", 32),
        Workload("batch-4", "batch 4, 32 new tokens", 32, batch=4),
        Workload("batch-16", "batch 16, 32 new tokens", 32, batch=16),
        Workload("answers", "batch 32, 3 new tokens", 3, batch=32),
    )
}
"""By name, in the order they run."""


class Requests:
    """Makes the requests of workloads for one bundle's tokenizer.

    Args:
        bundle: A bundle; all of a run are made from one checkpoint.

    Raises:
        InputError: No text of `PROMPT_TOKENS` tokens was found for this tokenizer.
    """

    def __init__(self, bundle: Bundle) -> None:
        m = bundle.manifest
        self._tokenizer = Tokenizer(bundle.path(TOKENIZER), bos_id=m.tokens.bos)
        self._limits, self._size, self._image_tokens = m.limits, m.image.size, m.dimensions.num_image_tokens
        self._single = self._fit(PROMPT_TOKENS)
        # a batch goes through answer_batch, which puts the bundle's template around the question
        self._batch = fill_template(m.prompts["answer"], text="what shape", language="en")

    def refuse(self, workload: Workload) -> str | None:
        """Say why this bundle cannot do a workload; None if it can."""
        if workload.new_tokens > self._limits.new_tokens:
            return f"the bundle makes at most {self._limits.new_tokens} tokens, {workload.new_tokens} are asked"
        return None

    def positions(self, workload: Workload) -> int:
        """Length of a row's prompt, image tokens included."""
        return self._image_tokens + self._tokens(self._prompt(workload))

    def message(self, workload: Workload, number: int) -> dict[str, Any]:
        """Return a request as JSON; every `number` has pictures of its own, so that nothing kept from earlier rounds helps."""
        return {
            "prompts": [self._prompt(workload)] * max(workload.batch, workload.questions),
            "pictures": workload.batch,
            "size": self._size,
            "number": number,
            "new_tokens": workload.new_tokens,
            "reuse_picture": workload.questions > 1,
        }

    def _prompt(self, workload: Workload) -> str:
        return self._batch if workload.batch > 1 or workload.name == "batch-1" else self._single

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer.encode_prompt(text, max_tokens=self._limits.prompt_tokens))

    def _fit(self, wanted: int) -> str:
        """Find a prompt of exactly so many tokens: whole words first, then single characters."""
        text = ""
        for piece in (*FILLING.split(), *("a" * 20)):
            for longer in (f"{text} {piece}".strip(), text + piece[0]):
                try:
                    fits = self._tokens(longer) <= wanted
                except PromptError:  # longer than the bundle takes
                    fits = False
                if fits:
                    text = longer
                    break
            if text and self._tokens(text) == wanted:
                return text
        raise InputError(f"no text of {wanted} tokens was found for this bundle's tokenizer")


def read_message(message: dict[str, Any]) -> Request:
    """Turn `Requests.message` into a request."""
    rng = np.random.default_rng([message["number"], message["pictures"]])
    pictures = [_picture(rng, message["size"]) for _ in range(message["pictures"])]
    return Request(pictures, message["prompts"], message["new_tokens"], message["reuse_picture"])


def _picture(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Coarse random colours, uint8 [R, R, 3]: already of the model's size, so that resizing costs nobody anything."""
    coarse = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    side = -(-size // 7)
    return np.ascontiguousarray(coarse.repeat(side, axis=0).repeat(side, axis=1)[:size, :size])
