"""The decoder graph with its key/value cache: one call for a prompt, one per further token of all running rows.

The cache is a fixed number of slots, one per sequence. Prompts run into any neighbouring slots while the others keep
their place, so that a newcomer joins those that are decoding.

Shapes: B rows of a run, P image tokens, S text tokens, K key/value heads, T cache positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.manifest import Manifest

from .buffers import Features, SlotBuffer
from .providers import Shapes, Target, import_onnxruntime
from .session import failure

PROMPT_BUCKET = 16
"""Providers with fixed shapes get prompts padded to multiples of this many tokens."""
SessionFor = Callable[[Shapes | None], Any]
"""Opens (or returns) the decoder session for these input shapes; None: any shape."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The most probable token after each run, row by row."""

    tokens: NDArray[np.int64]
    """[burst, B]; a prompt is one run."""
    logprobs: NDArray[np.float32]
    """[burst, B]: natural log-probability of each under the full softmax."""


@dataclass(frozen=True, slots=True)
class _StepRun:
    """What one more token for rows 0 to B-1 needs, prepared once per B."""

    session: Any
    binding: Any
    positions: SlotBuffer
    """int64 [2, B]: write_indices and kv_lengths, so that one copy updates both."""


class Decoder:
    """Slots of a cache, written in place: past and present are bound to the same memory.

    Args:
        manifest: Dimensions, limits and types.
        target: Where the session runs.
        session_for: Opens sessions.
        slots: Sequences that fit at a time. Memory is taken at the first run.
    """

    def __init__(self, manifest: Manifest, target: Target, session_for: SessionFor, slots: int = 1) -> None:
        self.slots = slots
        self._ort = import_onnxruntime()
        self._manifest, self._target, self._session_for = manifest, target, session_for
        self._features_type = np.dtype(np.float16 if manifest.cache_type == "float16" else np.float32)
        self._lengths = np.zeros(slots, dtype=np.int64)  # valid positions of each slot; 0: free
        self._caches: dict[str, SlotBuffer] = {}
        self._outputs: dict[str, SlotBuffer] = {}
        self._prompts: dict[tuple[int, int, int, int], tuple[Any, Any]] = {}
        self._steps: dict[int, _StepRun] = {}

    def prompt(self, image_features: Features, prompts: list[list[int]], first: int = 0) -> Chosen:
        """Run whole prompts: image and text attend to each other in both directions, so this is one run.

        Args:
            image_features: [B, P, D].
            prompts: Ids of each row, `<bos>` to newline; rows may differ in length.
            first: They fill slots `first` to `first + B - 1`; other slots stay as they are.
        """
        batch, num_image_tokens, _ = image_features.shape
        assert batch == len(prompts)
        assert 0 <= first <= self.slots - batch
        self._allocate()
        inputs: dict[str, NDArray[Any]] = self._prompt_inputs(prompts, num_image_tokens, padded=self._target.static_shapes)
        inputs["image_features"] = np.ascontiguousarray(image_features, self._features_type)
        # bound once per place: with a hundred tensors that takes longer than a small model's run
        fixed = (num_image_tokens, inputs["input_ids"].shape[1]) if self._target.static_shapes else (0, 0)
        place = (first, batch, *fixed)
        if place not in self._prompts:
            self._prompts[place] = self._bind({name: value.shape for name, value in inputs.items()}, first, batch)
        session, binding = self._prompts[place]
        values = {name: self._on_device(value) for name, value in inputs.items()}  # a binding alone does not keep them
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        self._run(session, binding)
        self._lengths[first : first + batch] = inputs["kv_lengths"]
        tokens, logprobs = (self._outputs[name].read() for name in ("next_token", "next_token_logprob"))
        # copies: the next run writes into the same memory
        return Chosen(*(values[first : first + batch].T.copy() for values in (tokens, logprobs)))

    def _prompt_inputs(self, prompts: list[list[int]], num_image_tokens: int, *, padded: bool) -> dict[str, NDArray[Any]]:
        """Lay out prompts, right-padded: to the longest one, or to one of a few widths."""
        width = max(map(len, prompts))
        if padded:
            width = min(-(-width // PROMPT_BUCKET) * PROMPT_BUCKET, self._manifest.limits.prompt_tokens)
        input_ids = np.full((len(prompts), width), self._manifest.tokens.pad, dtype=np.int64)  # [B, S]
        for row, ids in enumerate(prompts):
            input_ids[row, : len(ids)] = ids
        return {
            "input_ids": input_ids,
            "write_indices": np.zeros(len(prompts), dtype=np.int64),
            "kv_lengths": np.array([num_image_tokens + len(ids) for ids in prompts], dtype=np.int64),
        }

    def step(self, rows: int, tokens: NDArray[np.int64] | None = None, burst: int = 1) -> Chosen:
        """Append one token to slots 0 to rows-1 and run the decoder on them, `burst` times.

        Free slots among them are computed along and stay free; slots from `rows` on must be free.

        Args:
            rows: How many slots.
            tokens: int64 [rows], what the first run appends; None: the most probable tokens of the last run, which
                are in place already. Later runs of a burst take those of the run before.
            burst: How many runs. Every slot must have room for them.
        """
        run = self._step_run(rows)
        if tokens is not None:
            self._outputs["next_token"].write(0, tokens[:, None])
        chosen = Chosen(np.empty((burst, rows), np.int64), np.empty((burst, rows), np.float32))
        lengths = self._lengths[: run.positions.shape(2)[1]]
        for count in range(burst):
            run.positions.write(0, np.stack([lengths, lengths + 1]))
            self._run(run.session, run.binding)
            lengths[lengths > 0] += 1
            chosen.tokens[count] = self._outputs["next_token"].read()[:rows, 0]
            chosen.logprobs[count] = self._outputs["next_token_logprob"].read()[:rows, 0]
        return chosen

    def logits(self, row: int) -> NDArray[np.float32]:
        """Return logits float32 [V] of a slot's last position; valid until the next run."""
        logits: NDArray[np.float32] = self._outputs["logits"].read()[row]
        return logits

    def length(self, row: int) -> int:
        """Return how many positions of a slot are valid; 0: it is free."""
        return int(self._lengths[row])

    def rewind(self, row: int, length: int) -> None:
        """Forget a slot's positions from `length` on; the next tokens overwrite them."""
        assert 0 <= length <= self._lengths[row]
        self._lengths[row] = length

    @property
    def copies(self) -> bool:
        """Whether `copy` is possible: the cache is in host memory."""
        return self._target.device == "cpu"

    def copy(self, source: int, target: int, first: int = 0) -> None:
        """Let a slot go on from where another one stands; logits are not copied.

        Args:
            source: A slot in use.
            target: Gets its length and its positions from `first` on.
            first: What comes before it is the same in both already.
        """
        end = int(self._lengths[source])
        assert 0 <= first <= end
        for cache in self._caches.values():
            cache.copy(source, target, first, end)
        self._lengths[target] = end

    def release(self, row: int) -> None:
        """Free a slot."""
        self.rewind(row, 0)

    def _run(self, session: Any, binding: Any) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            self._lengths[:] = 0  # whatever is in the cache now is of no use
            raise failure("the decoder fails", self._target, error) from error

    def _allocate(self) -> None:
        if self._caches:
            return
        try:
            self._new_buffers()
        except Exception as error:  # the limits of a bundle may ask for more memory than there is
            what = f"no room for {self.slots} sequences of {self._manifest.cache_length} positions"
            raise failure(what, self._target, error) from error

    def _new_buffers(self) -> None:
        caches, slots = self._new_caches(), self.slots
        self._outputs = {
            "logits": SlotBuffer(self._target, (slots, self._manifest.dimensions.vocab_size), np.float32),
            "next_token": SlotBuffer(self._target, (slots, 1), np.int64),
            "next_token_logprob": SlotBuffer(self._target, (slots, 1), np.float32),
        }
        self._caches = caches

    def _new_caches(self) -> dict[str, SlotBuffer]:
        d, slots = self._manifest.dimensions, self.slots
        shape = (slots, d.num_key_value_heads, self._manifest.cache_length, d.head_dim)  # [slots, K, T, H]
        dtype = None if self._manifest.cache_type == "bfloat16" else self._features_type
        # zeros: a masked position still meets its value times zero, which must not be infinity times zero
        return {
            f"{layer}.{part}": SlotBuffer(self._target, shape, dtype)
            for layer in range(d.num_hidden_layers)
            for part in ("key", "value")
        }

    def _step_run(self, rows: int) -> _StepRun:
        """Return what a step of this many rows needs; cached, because between two tokens there is no time to prepare."""
        if rows in self._steps:
            return self._steps[rows]
        batch = rows
        if self._target.static_shapes:  # few shapes, because each is a session and an engine of its own
            batch = min(1 << (rows - 1).bit_length(), self.slots)
        no_image = np.zeros((batch, 0, self._manifest.dimensions.hidden_size), self._features_type)  # [B, 0, D]
        positions = SlotBuffer(self._target, (2, batch), np.int64)
        shapes = {"input_ids": (batch, 1), "image_features": no_image.shape, "write_indices": (batch,), "kv_lengths": (batch,)}
        session, binding = self._bind(shapes, 0, batch)
        # the same memory as the output: greedy decoding feeds itself
        self._outputs["next_token"].bind_input(binding, "input_ids", 0, (batch, 1))
        binding.bind_ortvalue_input("image_features", self._on_device(no_image))
        positions.bind_input(binding, "write_indices", 0, (batch,))
        positions.bind_input(binding, "kv_lengths", 1, (batch,))
        self._steps[rows] = _StepRun(session, binding, positions)
        return self._steps[rows]

    def _bind(self, shapes: dict[str, tuple[int, ...]], first: int, count: int) -> tuple[Any, Any]:
        """Open a session and bind outputs and cache (past and present to the same memory) of some slots."""
        if self._target.static_shapes:
            shapes = shapes | {f"past_key_values.{name}": cache.shape(count) for name, cache in self._caches.items()}
        session = self._session_for(shapes if self._target.static_shapes else None)
        binding = session.io_binding()
        for name, value in self._outputs.items():
            value.bind_output(binding, name, first, value.shape(count))
        self._bind_cache(binding, first, count)
        return session, binding

    def _bind_cache(self, binding: Any, first: int, count: int) -> None:
        for name, cache in self._caches.items():
            cache.bind_input(binding, f"past_key_values.{name}", first, cache.shape(count))
            cache.bind_output(binding, f"present.{name}", first, cache.shape(count))

    def _on_device(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._target.device, self._target.device_id)
