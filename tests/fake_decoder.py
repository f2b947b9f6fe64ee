"""A decoder without a model: the logits are a random function of everything in a slot."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from pgfast.runtime.decoder import Chosen
from pgfast.runtime.sampling import log_softmax

VOCABULARY = 12


def fake_logits(picture: int, ids: tuple[int, ...]) -> np.ndarray:
    """float32 [V], another for every picture and every sequence."""
    digest = hashlib.sha256(repr((picture, ids)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(0, 2, VOCABULARY).astype(np.float32)


def fake_features(picture: int) -> np.ndarray:
    return np.full((1, 1, 1), picture, np.float32)


class FakeDecoder:
    """Keeps the rules of `Decoder` and checks that its user keeps them.

    Args:
        slots: How many.
        room: Tokens that fit behind a prompt.
    """

    def __init__(self, slots: int, room: int = 30) -> None:
        self.slots, self.room = slots, room
        self.pictures = [0] * slots
        self.ids: list[tuple[int, ...]] = [()] * slots  # (): free
        self.prompt_lengths = [0] * slots
        self.next = np.zeros(slots, np.int64)
        self.runs: list[tuple[Any, ...]] = []
        """("prompt", first slot, prompts) and ("step", rows, burst), in order."""
        self.before_run: Callable[[int], None] = lambda number: None
        """Called with the number of the run, in the scheduler's thread."""
        self.threads: set[int] = set()

    def prompt(self, image_features: np.ndarray, prompts: list[list[int]], first: int = 0) -> Chosen:
        self._begin(("prompt", first, [tuple(ids) for ids in prompts]))
        slots = range(first, first + len(prompts))
        for slot, features, ids in zip(slots, image_features, prompts, strict=True):
            assert not self.ids[slot], "the slot is taken"
            self.pictures[slot], self.ids[slot] = int(features[0, 0]), tuple(ids)
            self.prompt_lengths[slot] = len(ids)
        return self._chosen([self._best(slots)])

    def step(self, rows: int, tokens: np.ndarray | None = None, burst: int = 1) -> Chosen:
        self._begin(("step", rows, burst))
        assert not any(self.ids[rows:]), "a slot beyond the rows is taken"
        assert any(self.ids[:rows])
        results = []
        for count in range(burst):
            fed = self.next if tokens is None or count else tokens
            for slot in range(rows):
                if self.ids[slot]:
                    self.ids[slot] += (int(fed[slot]),)
                    assert len(self.ids[slot]) <= self.prompt_lengths[slot] + self.room, "past the end of the cache"
            results.append(self._best(range(rows)))
        return self._chosen(results)

    def logits(self, row: int) -> np.ndarray:
        assert self.ids[row]
        return fake_logits(self.pictures[row], self.ids[row])

    def rewind(self, row: int, length: int) -> None:
        length -= 1 if length else 0  # the picture has one position
        assert length <= len(self.ids[row])
        self.ids[row] = self.ids[row][:length]

    def copy(self, source: int, target: int, first: int = 0) -> None:
        assert self.ids[source], "a free slot is copied"
        assert source != target
        shared = max(0, first - 1)  # the picture has one position
        assert self.ids[target][:shared] == self.ids[source][:shared], "the target does not have what comes before"
        self.pictures[target], self.ids[target] = self.pictures[source], self.ids[source]
        self.prompt_lengths[target] = self.prompt_lengths[source]

    def release(self, row: int) -> None:
        self.ids[row] = ()

    def _begin(self, run: tuple[Any, ...]) -> None:
        self.threads.add(threading.get_ident())
        self.before_run(len(self.runs))
        self.runs.append(run)

    def _best(self, slots: range) -> list[tuple[int, float]]:
        found = []
        for slot in slots:
            logprobs = log_softmax(fake_logits(self.pictures[slot], self.ids[slot]))
            self.next[slot] = logprobs.argmax()
            found.append((int(self.next[slot]), float(logprobs.max())))
        return found

    def _chosen(self, results: list[list[tuple[int, float]]]) -> Chosen:
        array = np.array(results)  # [burst, B, 2]
        return Chosen(array[..., 0].astype(np.int64), array[..., 1].astype(np.float32))
