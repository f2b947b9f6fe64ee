"""Every way a checkpoint has been stored gives the same graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_bundle, open_model, random_pixels
from pgfast.export.config import read_config
from pgfast.export.gemma import rotary_tables
from pgfast.export.tensors import canonical_name
from pgfast.export.verify import TransformersReference, relative_error
from safetensors.numpy import load_file, save_file

PROMPT = [2, 7, 5, 12, 9, 4]


def logits(bundle: Path) -> np.ndarray:
    opened, model = open_model(bundle)
    model.decoder.prompt(model.encode(random_pixels(0, opened.manifest.image.size)), [PROMPT])
    return model.decoder.logits(0).copy()


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def rename(layout: str, name: str) -> str:
    """Names as older and newer versions of transformers have written them."""
    if layout == "before 4.52":
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    if layout == "after 4.52":
        name = name.replace("language_model.model.", "model.language_model.").replace(
            "vision_tower.", "vision_tower.vision_model."
        )
        return name if name.startswith("model.") else f"model.{name}"
    return name


@pytest.mark.parametrize("layout", ["before 4.52", "after 4.52"])
def test_both_state_dict_layouts_give_the_same_logits(layout: str, checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({rename(layout, name): tensor for name, tensor in tensors.items()}, copy / "model.safetensors")
    ours, wanted = make_bundle(copy, tmp_path / "ours"), make_bundle(checkpoint, tmp_path / "wanted")
    np.testing.assert_array_equal(logits(ours), logits(wanted))


def test_a_stored_head_that_differs_is_kept(copy: Path, tmp_path: Path) -> None:
    """transformers does not tie what is stored apart, whatever config.json says."""
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    ours = make_bundle(copy, tmp_path / "ours")
    reference = TransformersReference(copy)
    assert relative_error(logits(ours), reference.logits(random_pixels(0, 32), PROMPT)) < 1e-5


def test_sharded_files_and_a_tied_head_saved_twice_are_read(checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    half = len(names) // 2
    save_file({name: tensors[name] for name in names[:half]}, copy / "model-00001-of-00002.safetensors")
    rest = {name: tensors[name] for name in names[half:]} | {
        "lm_head.weight": tensors["language_model.model.embed_tokens.weight"]
    }
    save_file(rest, copy / "model-00002-of-00002.safetensors")
    shard_of = {name: f"model-0000{1 + (name in rest)}-of-00002.safetensors" for name in [*tensors, "lm_head.weight"]}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    ours, wanted = make_bundle(copy, tmp_path / "ours"), make_bundle(checkpoint, tmp_path / "wanted")
    np.testing.assert_array_equal(logits(ours), logits(wanted))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_sources_are_read_exactly(dtype: str, copy: Path, tmp_path: Path) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    tensors = {name: tensor.astype(kind) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    ours = make_bundle(copy, tmp_path / "ours")
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, copy / "model.safetensors")
    np.testing.assert_array_equal(logits(ours), logits(make_bundle(copy, tmp_path / "wanted")))


def test_rotary_tables_equal_transformers(checkpoint: Path) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding

    text = AutoConfig.from_pretrained(checkpoint).text_config
    cos, sin = rotary_tables(read_config(checkpoint / "config.json").text)
    positions = torch.arange(1, len(cos) + 1)[None]
    wanted_cos, wanted_sin = GemmaRotaryEmbedding(text)(torch.zeros(1), positions)
    half = cos.shape[1]
    assert relative_error(cos, wanted_cos[0, :, :half].numpy()) < 1e-5
    assert relative_error(sin, wanted_sin[0, :, :half].numpy()) < 1e-5


def test_exporting_twice_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first, second = make_bundle(checkpoint, tmp_path / "a"), make_bundle(checkpoint, tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_names_of_all_layouts_meet() -> None:
    for name in (
        "language_model.model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
    ):
        assert canonical_name(name) == "language_model.layers.0.mlp.up_proj.weight"
    for name in ("lm_head.weight", "language_model.lm_head.weight"):
        assert canonical_name(name) == "lm_head.weight"
