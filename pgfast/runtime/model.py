"""A bundle's two graphs on one provider: pixels to features, and the decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle

from .decoder import Decoder
from .providers import Shapes, Target
from .session import open_session


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
        if not target.static_shapes:  # a graph that does not load should fail now, not at the first question
            self._session("vision_encoder", None)
            self._session("decoder", None)
        self.decoder = Decoder(bundle.manifest, target, lambda shapes: self._session("decoder", shapes))

    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[Any]:
        """Run the vision encoder: float32 [B, 3, R, R] to image features [B, P, D]."""
        shapes = {"pixel_values": pixel_values.shape} if self._target.static_shapes else None
        session = self._session("vision_encoder", shapes)
        features: NDArray[Any] = session.run(["image_features"], {"pixel_values": pixel_values})[0]
        return features

    def _session(self, graph: str, shapes: Shapes | None) -> Any:
        key = (graph, tuple((name, tuple(shape)) for name, shape in shapes.items()) if shapes else None)
        if key not in self._sessions:
            spec = self._bundle.manifest.graphs[graph]
            path = self._bundle.path(spec.file)
            self._sessions[key] = open_session(path, spec, self._target, threads=self._threads, shapes=shapes)
        return self._sessions[key]
