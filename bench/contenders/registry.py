"""Which contenders there are, what they need, and how one is made."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from .base import Contender, Spec


@dataclass(frozen=True, slots=True)
class Kind:
    """One way of running the model."""

    module: str
    """Inside this folder."""
    cls: str
    needs: tuple[str, ...]
    """Modules that must be installed."""
    install: str
    """What to type when they are not."""


KINDS = {
    "pgfast": Kind("pgfast_engine", "PgfastEngine", ("onnxruntime",), "pip install 'pgfast[cpu]'"),
    "transformers": Kind("transformers_torch", "Transformers", ("torch", "transformers"), "pip install 'pgfast[verify]'"),
    "onnx": Kind("stock_onnx", "StockOnnx", ("onnxruntime",), "pip install 'pgfast[cpu]'"),
    "openvino": Kind("stock_openvino", "StockOpenVino", ("openvino",), "pip install openvino"),
}


def missing(kind: str) -> str | None:
    """Say in one line why a contender cannot run here; None if it can."""
    for module in KINDS[kind].needs:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: {KINDS[kind].install}"
    return None


def make(spec: Spec) -> Contender:
    """Load the contender."""
    kind = KINDS[spec.kind]
    cls = getattr(importlib.import_module(f".{kind.module}", __package__), kind.cls)
    contender: Contender = cls(spec)
    return contender
