"""The stock three-file ONNX export, run as any user would: `session.run`, the cache growing through Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.runtime.providers import import_onnxruntime

from .base import Inputs, Outcome, Probe, Request, Spec, greedy_loop, log_probability, one_by_one

GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
Run = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""Named arrays in, named arrays out."""


class StockOnnx:
    """The loop over the three graphs; subclasses say how a graph is opened."""

    def __init__(self, spec: Spec) -> None:
        self._inputs = Inputs(spec.bundle)
        folder = Path(spec.path) / "onnx"
        self._vision, self._embed, self._decoder = (self._open(folder / f"{name}.onnx", spec) for name in GRAPHS)

    def _open(self, path: Path, spec: Spec) -> Run:
        onnxruntime = import_onnxruntime()

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec.threads
        providers = ["CPUExecutionProvider"] if spec.provider == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        if (got := session.get_providers()[0]) != providers[0]:  # it falls back to the CPU without a word
            raise RuntimeError(f"ONNX Runtime runs {path.name} on {got}, not on {providers[0]}")
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))

    def answer(self, request: Request) -> Outcome:
        """Answer a request."""
        if request.reuse_picture:
            return one_by_one(self, request)
        start = time.perf_counter()
        logits = self._prompt(request)
        first = logits.argmax(axis=-1)
        ttft = time.perf_counter() - start
        tokens = greedy_loop(first, self._step, request.new_tokens, self._inputs.manifest.tokens.eos)
        self._inputs.text(tokens)
        return Outcome(tokens, ttft, time.perf_counter() - start)

    def probe(self, picture: NDArray[np.uint8], prompt: str, new_tokens: int) -> Probe:
        """Return greedy tokens and the first one's log-probability."""
        logits = self._prompt(Request([picture], [prompt], new_tokens))
        first = logits.argmax(axis=-1)
        (tokens,) = greedy_loop(first, self._step, new_tokens, self._inputs.manifest.tokens.eos)
        return Probe(tokens, log_probability(logits[0], int(first[0])))

    def device_bytes(self) -> int | None:
        """None: ONNX Runtime does not tell."""
        return None

    def _prompt(self, request: Request) -> NDArray[Any]:
        """Run picture and prompt; returns logits [B, V]."""
        d = self._inputs.manifest.dimensions
        features = self._vision({"pixel_values": self._inputs.pixels(request.pictures)})["image_features"]
        embeds = self._embed({"input_ids": self._inputs.ids(request.prompts)})["inputs_embeds"]
        empty = np.zeros((len(embeds), d.num_key_value_heads, 0, d.head_dim), np.float32)
        self._cache = {f"past_key_values.{i}.{part}": empty for i in range(d.num_hidden_layers) for part in ("key", "value")}
        return self._run(np.concatenate([features, embeds], axis=1))

    def _step(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Run one token per row, [B]; returns the next ones."""
        embeds = self._embed({"input_ids": tokens[:, None]})["inputs_embeds"]
        following: NDArray[np.int64] = self._run(embeds).argmax(axis=-1)
        return following

    def _run(self, embeds: NDArray[Any]) -> NDArray[Any]:
        batch, length, _ = embeds.shape
        past = next(iter(self._cache.values())).shape[2]
        positions = np.broadcast_to(np.arange(past + 1, past + 1 + length), (batch, length))
        feeds = {"inputs_embeds": embeds, "position_ids": np.ascontiguousarray(positions), "num_logits_to_keep": np.array(1)}
        outputs = self._decoder(feeds | self._cache)
        self._cache = {name: outputs[name.replace("past_key_values", "present")] for name in self._cache}
        logits: NDArray[Any] = outputs["logits"][:, -1]
        return logits
