"""A bundle's two graphs on one provider: pixels to features, and the decoder."""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.errors import ProviderError
from pgfast.manifest import Manifest

from .buffers import Features
from .cuda_decoder import CudaDecoder
from .cuda_graphs import CapturedVision, GraphRunner
from .decoder import Decoder
from .joined import JoinedRuns
from .providers import Shapes, Target
from .session import failure, open_session
from .shared_weights import SharedWeights
from .turns import STALL, Turns

logger = logging.getLogger(__name__)

STEP = "decoder_step"
"""The graph that only bundles for CUDA have."""

CPU_SLOTS, GPU_SLOTS = 16, 32
"""Sequences that decode together. Reading the weights once serves all of them; beyond this, arithmetic is the limit."""
TOGETHER = 4
"""Pictures, and prompts, that share a run: small models gain, and large ones, where arithmetic is the limit,
lose nothing. With fixed shapes it is 1, because every number would be an engine of its own."""
GPU_CACHE_BYTES = 2**30
"""On a GPU slots are memory from the start, so large pictures get fewer."""


def slots_of(manifest: Manifest, target: Target) -> int:
    """Return how many sequences of this bundle decode together, a power of two.

    On the CPU untouched slots cost no memory, so there is nothing to grow later.
    """
    if target.name == "cpu":
        return CPU_SLOTS
    d, size = manifest.dimensions, 4 if manifest.cache_type == "float32" else 2
    slot = 2 * d.num_hidden_layers * d.num_key_value_heads * manifest.cache_length * d.head_dim * size
    fitting = max(1, GPU_CACHE_BYTES // slot)
    return min(GPU_SLOTS, 1 << (fitting.bit_length() - 1))


class Model:
    """Sessions of a bundle, opened once per graph (and per input shape where the provider needs that).

    Args:
        bundle: The bundle.
        target: Where its graphs run.
        threads: CPU threads; None: one per core.

    Raises:
        BundleError: A graph does not load.
        ProviderError: The provider cannot run it.
    """

    def __init__(self, bundle: Bundle, target: Target, threads: int | None = None) -> None:
        self.bundle, self._target, self._threads = bundle, target, threads
        self._sessions: dict[Any, Any] = {}
        self._opening = threading.Lock()
        self.turns = Turns() if target.name == "cpu" else None
        """To be held for a run of either graph. On the CPU each has threads for all cores: at the same time both are slower
        than one after the other."""
        self.together = 1 if target.static_shapes else TOGETHER
        """Pictures, and prompts, that may share a run."""
        self._vision = JoinedRuns(self._run_vision, self.turns, most=self.together, stall=STALL)
        self._weights: SharedWeights | None = None
        self._captured: CapturedVision | None = None
        if target.name == "cuda" and STEP in bundle.manifest.graphs:
            self._captured = self._open_captured()
        # what does not load or run here should fail now, not at the first question
        if target.static_shapes:
            size = bundle.manifest.image.size
            self.encode(np.zeros((1, 3, size, size), np.float32))
        elif self._captured is None:
            # one after the other: at the same time is a little faster and takes half a gigabyte more at its peak (3B)
            self._session("decoder", None)
            self._session("vision_encoder", None)
        slots = slots_of(bundle.manifest, target)
        self.decoder: Decoder
        if self._captured is not None:
            sessions = self._session("decoder", None), self._session(STEP, None)
            self.decoder = CudaDecoder(bundle.manifest, target, *sessions, self._captured.runner, slots)
        else:
            self.decoder = Decoder(bundle.manifest, target, lambda shapes: self._session("decoder", shapes), slots)

    def _open_captured(self) -> CapturedVision:
        """Open what runs as CUDA graphs: prompts, single tokens with the same weights, and pictures."""
        manifest, plain = self.bundle.manifest, self._target
        data = self.bundle.path(f"{manifest.graphs['decoder'].file}.data")
        self._weights = SharedWeights(data, manifest.graphs[STEP].weights or {}, plain)

        def open_on(target: Target) -> CapturedVision:
            self._target = target
            self._session("decoder", None)
            self._session(STEP, None)
            return CapturedVision(self._session("vision_encoder", None), manifest, target, GraphRunner(target))

        try:
            return open_on(dataclasses.replace(plain, cuda_graph=True))
        except ProviderError as error:
            logger.warning("CUDA graphs do not work here, so every token takes longer: %s", error)
            self._sessions.clear()
            return open_on(plain)

    def encode(self, pixel_values: NDArray[np.float32]) -> Features:
        """Run the vision encoder: float32 [B, 3, R, R] to image features [B, P, D]."""
        if self._captured is not None:
            return self._captured.encode(pixel_values)
        return self._vision(pixel_values)

    def _run_vision(self, pixel_values: NDArray[np.float32]) -> NDArray[Any]:
        shapes = {"pixel_values": pixel_values.shape} if self._target.static_shapes else None
        session = self._session("vision_encoder", shapes)
        try:
            features: NDArray[Any] = session.run(["image_features"], {"pixel_values": pixel_values})[0]
        except Exception as error:
            raise failure("the vision encoder fails", self._target, error) from error
        return features

    def _session(self, graph: str, shapes: Shapes | None) -> Any:
        key = (graph, tuple((name, tuple(shape)) for name, shape in shapes.items()) if shapes else None)
        with self._opening:
            if key not in self._sessions:
                self._sessions[key] = self._open(graph, shapes)
            return self._sessions[key]

    def _open(self, graph: str, shapes: Shapes | None) -> Any:
        spec = self.bundle.manifest.graphs[graph]
        weights = self._weights.initializers if self._weights is not None and graph != "vision_encoder" else None
        path = self.bundle.path(spec.file)
        return open_session(path, spec, self._target, threads=self._threads, shapes=shapes, weights=weights)
