"""A bundle's two graphs on one provider: pixels to features, and the decoder."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.manifest import Manifest

from .decoder import Decoder
from .providers import Shapes, Target
from .session import failure, open_session
from .turns import Turns

CPU_SLOTS, GPU_SLOTS = 16, 32
"""Sequences that decode together. Reading the weights once serves all of them; beyond this, arithmetic is the limit."""
TOGETHER = 4
"""Pictures, and prompts, of one batch that share a run: small models gain, and large ones, where arithmetic is the limit,
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
        self._bundle, self._target, self._threads = bundle, target, threads
        self._sessions: dict[Any, Any] = {}
        self._opening = threading.Lock()
        self.turns: AbstractContextManager[Any] = Turns() if target.name == "cpu" else nullcontext()
        """To be held for a run of either graph. On the CPU each has threads for all cores: at the same time both are slower
        than one after the other."""
        self._picture = threading.Lock()  # one asks for a turn at a time, so that the decoder has every second one
        # what does not load or run here should fail now, not at the first question
        if target.static_shapes:
            size = bundle.manifest.image.size
            self.encode(np.zeros((1, 3, size, size), np.float32))
        else:
            self._open_both()
        slots = slots_of(bundle.manifest, target)
        self.decoder = Decoder(bundle.manifest, target, lambda shapes: self._session("decoder", shapes), slots)
        self.together = 1 if target.static_shapes else TOGETHER
        """Pictures, and prompts, of one batch that may share a run."""

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[Any]:
        """Run the vision encoder: float32 [B, 3, R, R] to image features [B, P, D]."""
        shapes = {"pixel_values": pixel_values.shape} if self._target.static_shapes else None
        session = self._session("vision_encoder", shapes)
        try:
            with self._picture, self.turns:
                features: NDArray[Any] = session.run(["image_features"], {"pixel_values": pixel_values})[0]
        except Exception as error:
            raise failure("the vision encoder fails", self._target, error) from error
        return features

    def _open_both(self) -> None:
        """Open both graphs at the same time: most of it is one core's work, bringing weights into the kernels' layout."""
        with ThreadPoolExecutor(1) as pool:
            vision = pool.submit(self._open, "vision_encoder", None)
            self._sessions["decoder", None] = self._open("decoder", None)
            self._sessions["vision_encoder", None] = vision.result()

    def _session(self, graph: str, shapes: Shapes | None) -> Any:
        key = (graph, tuple((name, tuple(shape)) for name, shape in shapes.items()) if shapes else None)
        with self._opening:
            if key not in self._sessions:
                self._sessions[key] = self._open(graph, shapes)
            return self._sessions[key]

    def _open(self, graph: str, shapes: Shapes | None) -> Any:
        spec = self._bundle.manifest.graphs[graph]
        return open_session(self._bundle.path(spec.file), spec, self._target, threads=self._threads, shapes=shapes)
