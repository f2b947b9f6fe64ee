"""The decoder on CUDA: a graph for prompts and one for single tokens, replayed as CUDA graphs.

A step reads the token that the step before left on the device and moves each row's place in the cache on by itself. So a
burst of steps is a burst of launches: nothing is copied to or from the host between them, and only the last one is waited for.

Shapes as in decoder.py; the ring is a few places that the tokens of consecutive steps go to in turn, R of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.manifest import Manifest

from .buffers import DeviceFeatures, Features, SlotBuffer, to_device
from .cuda_graphs import NO_GRAPH, GraphRunner
from .decoder import Chosen, Decoder
from .providers import Target
from .session import failure

RING = 8
"""R: steps between two reads of their tokens, and so graphs captured per number of rows."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """A run at fixed addresses."""

    binding: Any
    graph_id: int
    inputs: dict[str, Any]
    """OrtValues of a prompt's inputs."""


class CudaDecoder(Decoder):
    """`Decoder` over two sessions with common weights.

    Args:
        manifest: Dimensions, limits and types.
        target: Where the sessions run.
        prompt_session: Of graph `decoder`.
        step_session: Of graph `decoder_step`.
        runner: Runs them.
        slots: Sequences that fit at a time.
    """

    def __init__(
        self, manifest: Manifest, target: Target, prompt_session: Any, step_session: Any, runner: GraphRunner, slots: int = 1
    ) -> None:
        super().__init__(manifest, target, lambda shapes: prompt_session, slots)
        self._prompt_session, self._step_session, self.runner = prompt_session, step_session, runner
        self._latest = np.zeros(slots, np.int64)  # token of each slot that the next step appends
        self._in_place = False  # whether the device has `_latest` and the lengths
        self._position = 0  # place in the ring that holds the latest tokens
        self._captured_prompts: dict[int, _Bound] = {}  # by width
        self._bursts: dict[tuple[int, int], _Bound] = {}  # by rows and place in the ring
        self._logits: dict[int, SlotBuffer] = {}  # by rows
        self._logits_of: tuple[int, int] = (1, 0)  # rows of the last run, its first slot
        self._logits_on_host: NDArray[np.float32] | None = None

    def prompt(self, image_features: Features, prompts: list[list[int]], first: int = 0) -> Chosen:
        """As `Decoder.prompt`; one prompt in slot 0 with one picture is replayed, any other is run.

        Args:
            image_features: [B, P, D].
            prompts: Ids of each row.
            first: The first slot.
        """
        count = len(prompts)
        assert count == image_features.shape[0]
        assert 0 <= first <= self.slots - count
        with self.runner.lock:
            self._allocate()
            inputs = self._prompt_inputs(prompts, image_features.shape[1], padded=True)
            width = inputs["input_ids"].shape[1]
            alone = (count, first, image_features.shape[1]) == (1, 0, self._manifest.dimensions.num_image_tokens)
            bound = self._captured_prompts.get(width) if alone else None
            if bound is None:
                bound = self._bind_prompt(inputs, image_features.shape, first, keep=alone)
            for name, value in inputs.items():
                bound.inputs[name].update_inplace(value)
            if isinstance(image_features, DeviceFeatures):
                bound.inputs["image_features"].update_inplace(image_features.value)
            else:
                bound.inputs["image_features"].update_inplace(np.ascontiguousarray(image_features, self._features_type))
            self._launch(self._prompt_session, bound)
            self._logits_of, self._logits_on_host = (_bucket(count, self.slots), first), None
            chosen = Chosen(*(self._outputs[n].read()[:count].T.copy() for n in ("next_token", "next_token_logprob")))
        self._lengths[first : first + count] = inputs["kv_lengths"]
        self._latest[first : first + count] = chosen.tokens[0]
        self._in_place = False
        return chosen

    def step(self, rows: int, tokens: NDArray[np.int64] | None = None, burst: int = 1) -> Chosen:
        """As `Decoder.step`.

        Args:
            rows: How many slots.
            tokens: int64 [rows], what the first run appends; None: the most probable tokens of the last run.
            burst: How many runs; every R of them are waited for.
        """
        if tokens is not None:
            self._latest[:rows], self._in_place = tokens, False
        count = _bucket(rows, self.slots)
        chosen = Chosen(np.empty((burst, rows), np.int64), np.empty((burst, rows), np.float32))
        with self.runner.lock:
            for first in range(0, burst, RING):
                runs = self._prepare(count, min(RING, burst - first))
                for number, run in enumerate(runs):
                    self._launch(self._step_session, run, wait=number == len(runs) - 1)
                places = (self._position + 1 + np.arange(len(runs))) % RING
                ring_tokens = self._tokens.read().reshape(RING, self.slots)[places]
                ring_logprobs = self._logprobs.read().reshape(RING, self.slots)[places]
                chosen.tokens[first : first + len(runs)] = ring_tokens[:, :rows]
                chosen.logprobs[first : first + len(runs)] = ring_logprobs[:, :rows]
                self._position, self._latest[:count] = int(places[-1]), ring_tokens[-1, :count]
                self._lengths[:count][self._lengths[:count] > 0] += len(runs)
        self._logits_of, self._logits_on_host = (count, 0), None
        return chosen

    def logits(self, row: int) -> NDArray[np.float32]:
        """Return logits float32 [V] of a slot of the last run; valid until the next one."""
        count, first = self._logits_of
        if self._logits_on_host is None:
            self._logits_on_host = self._logits[count].read()
        logits: NDArray[np.float32] = self._logits_on_host[row - first]
        return logits

    def rewind(self, row: int, length: int) -> None:
        """Forget a slot's positions from `length` on; the next tokens overwrite them."""
        super().rewind(row, length)
        self._in_place = False

    def _prepare(self, count: int, steps: int) -> list[_Bound]:
        """Return the next runs; afterwards the device has all that they need."""
        runs = [self._bind_step(count, (self._position + number) % RING) for number in range(steps)]
        if self._in_place and not any(self.runner.needs_capture(run.graph_id) for run in runs):
            return runs
        self._position = 0
        runs = [self._bind_step(count, number) for number in range(steps)]
        if any(self.runner.needs_capture(run.graph_id) for run in runs):
            # a capture runs steps: in the last place of the cache, which a row that can still be continued has not reached
            self._index.write(0, np.full(self.slots, self._manifest.cache_length - 1, np.int32))
            for run in runs:
                if self.runner.needs_capture(run.graph_id):
                    self._launch(self._step_session, run)
        self._tokens.write(0, np.tile(self._latest, RING)[:, None])
        self._index.write(0, np.maximum(self._lengths - 1, 0).astype(np.int32))
        self._in_place = True
        return runs

    def _launch(self, session: Any, run: _Bound, *, wait: bool = True) -> None:
        try:
            self.runner.run(session, run.binding, run.graph_id, wait=wait)
        except Exception as error:
            self._lengths[:], self._in_place = 0, False  # whatever is in the cache now is of no use
            raise failure("the decoder fails", self._target, error) from error

    def _new_buffers(self) -> None:
        caches = self._new_caches()
        self._outputs = {
            "next_token": SlotBuffer(self._target, (self.slots, 1), np.int64),
            "next_token_logprob": SlotBuffer(self._target, (self.slots, 1), np.float32),
        }
        self._tokens = SlotBuffer(self._target, (RING * self.slots, 1), np.int64)
        self._logprobs = SlotBuffer(self._target, (RING * self.slots, 1), np.float32)
        self._index = SlotBuffer(self._target, (self.slots,), np.int32)  # cache slot of each row's newest position
        self._caches = caches

    def _bind_prompt(
        self, inputs: dict[str, NDArray[Any]], features_shape: tuple[int, ...], first: int, *, keep: bool
    ) -> _Bound:
        """Bind a prompt's inputs and the slots it fills; kept, to be captured, where that is worth it."""
        count, width = inputs["input_ids"].shape
        binding = self._prompt_session.io_binding()
        values = {name: to_device(self._target, value.copy()) for name, value in inputs.items()}
        values["image_features"] = to_device(self._target, np.zeros(features_shape, self._features_type))
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name, buffer in self._outputs.items():
            buffer.bind_output(binding, name, 0, buffer.shape(count))
        self._bind_logits(binding, count)
        self._bind_cache(binding, first, count)
        if not keep:
            return _Bound(binding, NO_GRAPH, values)
        self._captured_prompts[width] = _Bound(binding, self.runner.new_id(), values)
        return self._captured_prompts[width]

    def _bind_step(self, count: int, place: int) -> _Bound:
        """Bind a step of `count` rows that takes its tokens from one place of the ring and leaves them in the next."""
        key = (count, place)
        if key not in self._bursts:
            self._allocate()
            here, following = place * self.slots, (place + 1) % RING * self.slots
            binding = self._step_session.io_binding()
            self._tokens.bind_input(binding, "input_ids", here, (count, 1))
            self._tokens.bind_output(binding, "next_token", following, (count, 1))
            self._logprobs.bind_output(binding, "next_token_logprob", following, (count, 1))
            self._index.bind_input(binding, "last_index", 0, (count,))
            self._index.bind_output(binding, "next_index", 0, (count,))
            self._bind_logits(binding, count)
            self._bind_cache(binding, 0, count)
            self._bursts[key] = _Bound(binding, self.runner.new_id(), {})
        return self._bursts[key]

    def _bind_logits(self, binding: Any, count: int) -> None:
        """Let a run leave its logits in a buffer of its size, so that sampling reads no more than it needs."""
        size = _bucket(count, self.slots)
        if size not in self._logits:
            self._logits[size] = SlotBuffer(self._target, (size, self._manifest.dimensions.vocab_size), np.float32)
        self._logits[size].bind_output(binding, "logits", 0, self._logits[size].shape(count))


def _bucket(rows: int, slots: int) -> int:
    """The number of rows that is run for so many: few different ones, because each is captured on its own."""
    return min(1 << (rows - 1).bit_length(), slots)
