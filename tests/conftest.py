"""Shared fixtures: random-weight checkpoints, bundles made from them, and transformers as the reference."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import onnxruntime
import pytest
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions
from pgfast.export.verify import TransformersReference

import pgfast
from pgfast.bundle import Bundle
from pgfast.engine import Engine
from pgfast.runtime.model import Model
from pgfast.runtime.providers import Target

TESTS = Path(__file__).parent
DEMO_CHECKPOINT = TESTS / "demo_checkpoint"
WORDS = ["answer en what color shape is the in a picture there circle red blue green ? yes no"]


def pytest_report_header() -> str:
    import torch
    import transformers

    return f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"


@dataclass(frozen=True)
class Shape:
    """What a random-weight PaliGemma looks like; the defaults are small but not degenerate."""

    seed: int = 0
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 48
    intermediate: int = 72
    vision_hidden: int = 32
    vision_layers: int = 2
    image_size: int = 32
    patch_size: int = 8
    tied: bool = True
    max_positions: int = 256
    gemma2: bool = False
    query_pre_attn_scalar: int = 24
    attn_cap: float | None = 4.0
    final_cap: float | None = 3.0


def make_checkpoint(folder: Path, shape: Shape) -> Path:
    """Save a `PaliGemmaForConditionalGeneration` whose weights are large enough for logits to differ."""
    import torch
    from pgfast.train.demo import tiny_paligemma
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    tokenizer = tiny_paligemma.build_tokenizer(WORDS)
    raw = tiny_paligemma.build_config(tokenizer).to_dict()
    raw["vision_config"] |= {
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_hidden_layers": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "projection_dim": shape.hidden,
    }
    raw["text_config"] |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
    }
    if shape.gemma2:
        raw["text_config"] |= {
            "model_type": "gemma2",
            "query_pre_attn_scalar": shape.query_pre_attn_scalar,
            "attn_logit_softcapping": shape.attn_cap,
            "final_logit_softcapping": shape.final_cap,
        }
        raw["text_config"].pop("hidden_act")
    raw |= {"hidden_size": shape.hidden, "projection_dim": shape.hidden, "tie_word_embeddings": shape.tied}
    config = PaliGemmaConfig(**raw)
    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(shape.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases around their neutral value, matrices preserving the scale of what flows through
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            neutral = 1.0 if name.endswith(("layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight")) else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + neutral)
    tiny_paligemma.save_checkpoint(folder, model, tokenizer)
    size = {"height": shape.image_size, "width": shape.image_size}
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))
    return folder


def open_model(bundle: Path) -> tuple[Bundle, Model]:
    """Open a bundle below the engine, on the CPU."""
    opened = Bundle.open(bundle)
    return opened, Model(opened, Target("cpu"))


class Fixed(Target):
    """TensorRT's way of running, on the CPU: one session per shape."""

    @property
    def static_shapes(self) -> bool:
        return True


def make_bundle(checkpoint: Path, out: Path, *, precision: str = "fp32", dialect: str = "ort") -> Path:
    """Export in one of the dialects."""
    export(str(checkpoint), out, ExportOptions(precision, "cpu" if dialect == "ort" else "tensorrt"))
    return out


def random_pixels(seed: int, size: int) -> np.ndarray:
    """float32 [1, 3, R, R] in -1..1."""
    return np.random.default_rng(seed).uniform(-1, 1, (1, 3, size, size)).astype(np.float32)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random checkpoint for all tests that do not care about its shape."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), Shape())


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> TransformersReference:
    return TransformersReference(checkpoint)


@pytest.fixture(scope="session", params=["ort", "standard"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint as an fp32 bundle, in each dialect."""
    return make_bundle(checkpoint, tmp_path_factory.mktemp("bundle") / request.param, dialect=request.param)


@pytest.fixture(scope="session")
def demo() -> Engine:
    """The embedded bundle."""
    return pgfast.load(provider="cpu")


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """A blue circle on white, uint8 [96, 96, 3]."""
    y, x = np.mgrid[:96, :96]
    inside = (y - 40) ** 2 + (x - 55) ** 2 < 20**2
    return np.where(inside[..., None], np.uint8([0, 0, 255]), np.uint8([255, 255, 255])).astype(np.uint8)
