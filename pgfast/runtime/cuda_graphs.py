"""CUDA graphs: a run is captured once and replayed with one call, without the launch of each kernel.

A captured run reads and writes the addresses it was captured with, so its binding stays and only contents change.
"""

from __future__ import annotations

import itertools
import logging
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.manifest import Manifest

from .buffers import DeviceFeatures, Features, to_device
from .providers import Target, import_onnxruntime
from .session import failure

logger = logging.getLogger(__name__)

NO_GRAPH = -1
"""ONNX Runtime's id for runs that are not to be captured."""


class GraphRunner:
    """Runs bindings of the sessions of one model, as CUDA graphs where that works.

    Args:
        target: Where the sessions run; without `cuda_graph` nothing is captured.
    """

    def __init__(self, target: Target) -> None:
        self.lock = threading.RLock()
        """Held while anything is on its way to the device: a capture fails when another thread copies meanwhile."""
        self._ort, self._enabled = import_onnxruntime(), target.cuda_graph
        self._ids = itertools.count(1)
        self._captured: set[int] = set()
        self._options: dict[tuple[int, bool], Any] = {}
        self.no_graph = self._run_options(NO_GRAPH, True)
        """For runs without a binding; a run that says nothing would be captured."""

    def new_id(self) -> int:
        """Return an id for a binding that is to be captured, unique among all sessions."""
        return next(self._ids)

    def needs_capture(self, graph_id: int) -> bool:
        """Whether the next run of this id executes the model several times: warm-up, capture, launch."""
        return self._enabled and graph_id not in self._captured

    def disable(self) -> None:
        """Run everything kernel by kernel from now on."""
        self._enabled = False

    def run(self, session: Any, binding: Any, graph_id: int = NO_GRAPH, *, wait: bool = True) -> None:
        """Run a binding.

        Args:
            session: The binding's session.
            binding: Inputs and outputs.
            graph_id: From `new_id`.
            wait: Whether the results must be there on return; runs of one session follow each other anyway.
        """
        if not self._enabled:
            graph_id = NO_GRAPH
        try:
            session.run_with_iobinding(binding, self._run_options(graph_id, wait))
        except Exception as error:
            if graph_id == NO_GRAPH or graph_id in self._captured:
                raise
            logger.warning("CUDA graphs do not work here, so every token takes longer: %s", " ".join(str(error).split())[:300])
            self.disable()
            self.run(session, binding, wait=wait)
        else:
            self._captured.add(graph_id)

    def _run_options(self, graph_id: int, wait: bool) -> Any:
        key = (graph_id, wait)
        if key not in self._options:
            options = self._ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
            if not wait:
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._options[key] = options
        return self._options[key]


class CapturedVision:
    """The vision encoder, captured for one picture.

    Args:
        session: The graph's session.
        manifest: Sizes and types.
        target: Where it runs.
        runner: Runs it.
    """

    def __init__(self, session: Any, manifest: Manifest, target: Target, runner: GraphRunner) -> None:
        self.runner = runner
        self._session, self._target, self._id = session, target, runner.new_id()
        d, size = manifest.dimensions, manifest.image.size
        features_type = manifest.graphs["vision_encoder"].outputs["image_features"].split("[")[0]
        self._empty = np.zeros((1, d.num_image_tokens, d.hidden_size), features_type)  # [1, P, D]
        self._pixels = to_device(target, np.zeros((1, 3, size, size), np.float32))
        self._features = to_device(target, self._empty.copy())
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("pixel_values", self._pixels)
        self._binding.bind_ortvalue_output("image_features", self._features)

    def encode(self, pixel_values: NDArray[np.float32]) -> Features:
        """Encode pictures, float32 [B, 3, R, R]; the features of a single one stay on the device."""
        with self.runner.lock:
            try:
                if len(pixel_values) > 1:
                    features: NDArray[Any] = self._session.run(None, {"pixel_values": pixel_values}, self.runner.no_graph)[0]
                    return features
                self._pixels.update_inplace(np.ascontiguousarray(pixel_values))
                self.runner.run(self._session, self._binding, self._id)
                # a copy on the device: the next picture is written to the same address
                copy = to_device(self._target, self._empty.copy())
                copy.update_inplace(self._features)
            except Exception as error:
                raise failure("the vision encoder fails", self._target, error) from error
        return DeviceFeatures(copy)
