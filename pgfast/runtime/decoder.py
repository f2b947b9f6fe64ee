"""The decoder graph with its key/value cache: one call for the prompt, one per further token.

Shapes: B batch, P image tokens, S text tokens, T cache slots, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.manifest import Manifest

from .providers import Shapes, Target, import_onnxruntime
from .session import failure

PROMPT_BUCKET = 16
"""Providers with fixed shapes get prompts padded to multiples of this many tokens."""
BFLOAT16 = 16
"""ONNX's number of a type that numpy lacks (TensorProto.DataType)."""
SessionFor = Callable[[Shapes | None], Any]
"""Opens (or returns) the decoder session for these input shapes; None: any shape."""


class Decoder:
    """Prompt and decoding steps of one batch at a time.

    The cache is allocated once per batch size and written in place: past and present are bound to the same tensors.

    Args:
        manifest: Dimensions, limits and types.
        target: Where the session runs.
        session_for: Opens sessions.
    """

    def __init__(self, manifest: Manifest, target: Target, session_for: SessionFor) -> None:
        self._ort = import_onnxruntime()
        self._manifest, self._target, self._session_for = manifest, target, session_for
        self._features_type = np.dtype(np.float16 if manifest.cache_type == "float16" else np.float32)
        self._caches: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._batch = 0
        self._lengths = np.zeros(0, dtype=np.int64)
        self._step_binding: Any = None
        self._step_inputs: dict[str, Any] = {}
        self._step_session: Any = None

    @property
    def next_token(self) -> NDArray[np.int64]:
        """[B]: the most probable token after the last run."""
        tokens: NDArray[np.int64] = self._outputs["next_token"].numpy()[:, 0]
        return tokens

    @property
    def next_token_logprob(self) -> NDArray[np.float32]:
        """[B]: natural log-probability of `next_token` under the full softmax."""
        logprobs: NDArray[np.float32] = self._outputs["next_token_logprob"].numpy()[:, 0]
        return logprobs

    @property
    def logits(self) -> NDArray[np.float32]:
        """[B, V] float32 of each row's last valid position."""
        logits: NDArray[np.float32] = self._outputs["logits"].numpy()
        return logits

    def prompt(self, image_features: NDArray[Any], prompts: list[list[int]]) -> None:
        """Run whole prompts: image and text attend to each other in both directions, so this is one run.

        Args:
            image_features: [B, P, D].
            prompts: Ids of each row, `<bos>` to newline; rows may differ in length.
        """
        batch, num_image_tokens, _ = image_features.shape
        self._allocate(batch)
        width = max(map(len, prompts))
        if self._target.static_shapes:
            width = min(-(-width // PROMPT_BUCKET) * PROMPT_BUCKET, self._manifest.limits.prompt_tokens)
        input_ids = np.full((batch, width), self._manifest.tokens.pad, dtype=np.int64)  # [B, S]
        for row, ids in enumerate(prompts):
            input_ids[row, : len(ids)] = ids
        lengths = np.array([num_image_tokens + len(ids) for ids in prompts], dtype=np.int64)
        inputs = {
            "input_ids": self._on_device(input_ids),
            "image_features": self._on_device(image_features.astype(self._features_type, copy=False)),
            "write_indices": self._on_device(np.zeros(batch, dtype=np.int64)),
            "kv_lengths": self._on_device(lengths),
        }
        self._run(*self._bind(inputs))
        self._lengths = lengths

    def step(self, tokens: NDArray[np.int64] | None = None) -> None:
        """Append one token to every row and run the decoder on it.

        Args:
            tokens: int64 [B]; None feeds `next_token` back without a copy.
        """
        if self._step_binding is None:
            no_image = np.zeros((self._batch, 0, self._manifest.dimensions.hidden_size), self._features_type)  # [B, 0, D]
            self._step_inputs = {
                "input_ids": self._outputs["next_token"],  # the same memory: greedy decoding feeds itself
                "image_features": self._on_device(no_image),
                "write_indices": self._on_device(self._lengths),
                "kv_lengths": self._on_device(self._lengths + 1),
            }
            self._step_session, self._step_binding = self._bind(self._step_inputs)
        else:
            self._step_inputs["write_indices"].update_inplace(self._lengths)
            self._step_inputs["kv_lengths"].update_inplace(self._lengths + 1)
        if tokens is not None:
            self._outputs["next_token"].update_inplace(np.ascontiguousarray(tokens, dtype=np.int64)[:, None])
        self._run(self._step_session, self._step_binding)
        self._lengths = self._lengths + 1

    def _run(self, session: Any, binding: Any) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            self._batch, self._step_binding = 0, None  # whatever is in the cache now is of no use
            raise failure("the decoder fails", self._target, error) from error

    def _allocate(self, batch: int) -> None:
        """Make the cache and the outputs for this many rows, unless they are there already."""
        if batch == self._batch:
            return
        d = self._manifest.dimensions
        shape = (batch, d.num_key_value_heads, self._manifest.cache_length, d.head_dim)  # [B, K, T, H]
        self._caches = {
            f"{layer}.{part}": self._empty_cache(shape) for layer in range(d.num_hidden_layers) for part in ("key", "value")
        }
        self._outputs = {
            "logits": self._on_device(np.zeros((batch, d.vocab_size), np.float32)),
            "next_token": self._on_device(np.zeros((batch, 1), np.int64)),
            "next_token_logprob": self._on_device(np.zeros((batch, 1), np.float32)),
        }
        self._batch, self._step_binding = batch, None

    def _bind(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Bind inputs, outputs and the cache (past and present to the same memory)."""
        shapes = None
        if self._target.static_shapes:
            shapes = {name: value.shape() for name, value in inputs.items()}
            shapes |= {f"past_key_values.{name}": value.shape() for name, value in self._caches.items()}
        session = self._session_for(shapes)
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            binding.bind_ortvalue_output(name, value)
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return session, binding

    def _empty_cache(self, shape: tuple[int, ...]) -> Any:
        """Zeros: a masked slot still meets its value times zero, which must not be infinity times zero."""
        if self._manifest.cache_type != "bfloat16":
            return self._on_device(np.zeros(shape, self._features_type))
        zeros = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), BFLOAT16)
        if self._target.device == "cpu":
            return zeros
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, BFLOAT16, self._target.device, self._target.device_id)
        value.update_inplace(zeros)
        return value

    def _on_device(self, array: NDArray[Any]) -> Any:
        # a copy of its own on the CPU too, where an OrtValue would share numpy's memory
        return self._ort.OrtValue.ortvalue_from_numpy(array.copy(), self._target.device, self._target.device_id)
