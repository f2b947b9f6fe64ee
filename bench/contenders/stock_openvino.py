"""The same three graphs in OpenVINO, where it can take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .base import Spec
from .stock_onnx import Run, StockOnnx


class StockOpenVino(StockOnnx):
    """OpenVINO reads the ONNX files and compiles them for the CPU."""

    def _open(self, path: Path, spec: Spec) -> Run:
        import openvino

        core: Any = openvino.Core()
        # its CPU default is bf16 where the processor has it: asked for fp32, it shall be fp32
        settings = {"INFERENCE_NUM_THREADS": spec.threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
        names = [output.get_any_name() for output in compiled.outputs]

        def run(feeds: dict[str, Any]) -> dict[str, Any]:
            results = compiled(feeds)
            return {name: np.array(results[name]) for name in names}

        return run
