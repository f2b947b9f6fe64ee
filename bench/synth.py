"""Full-size PaliGemma checkpoints with random weights: speed and memory need no trained ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pgfast.errors import InputError, MissingDependencyError

SHARD_BYTES = 2 * 10**9
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
_GEMMA = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "vocab_size": 257216,
}
_GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "vocab_size": 257216,
}
_GEMMA2_10B = _GEMMA2 | {
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
}
_GEMMA2_28B = _GEMMA2 | {
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
}
_TEXT = {"3b": _GEMMA, "2-3b": _GEMMA2, "2-10b": _GEMMA2_10B, "2-28b": _GEMMA2_28B}
MODELS = [f"{family}-{size}" for family in _TEXT for size in (224, 448, 896)]
"""Names such as 3b-224 (PaliGemma) and 2-3b-448 (PaliGemma 2)."""


def config_of(model: str) -> dict[str, Any]:
    """Return `config.json` of a full-size model.

    Raises:
        InputError: The name is unknown.
    """
    if model not in MODELS:
        raise InputError(f"unknown model {model!r}: choose one of {', '.join(MODELS)}")
    family, size = model.rsplit("-", 1)
    text = _TEXT[family]
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": 257152,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": text["hidden_size"],
        "projection_dim": text["hidden_size"],
        "text_config": text,
        "vision_config": _SIGLIP | {"image_size": int(size), "projection_dim": text["hidden_size"]},
    }


def synthesize(
    model: str, out: Path, seed: int = 0, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write a checkpoint folder in bfloat16 shards, as the Hub has them.

    Args:
        model: One of `MODELS`.
        out: Folder to create.
        seed: Of the weights.
        on_progress: Called with (tensors written, tensors in all).

    Raises:
        InputError: The name is unknown or the folder exists.
    """
    try:
        import ml_dtypes
        from safetensors.numpy import save_file
    except ImportError as error:
        raise MissingDependencyError(error.name or "safetensors", "export") from error
    from pgfast.export.config import parse_config
    from pgfast.export.weights import decoder_rows, vision_rows

    raw = config_of(model)
    if out.exists():
        raise InputError(f"{out} exists: choose another folder or remove it")
    out.mkdir(parents=True)
    config = parse_config(raw)
    shapes = {
        name: shape for rows in (vision_rows(config), decoder_rows(config)) for row in rows for name, shape in row.sources
    }
    rng = np.random.default_rng(seed)
    shard: dict[str, Any] = {}
    shard_of: dict[str, str] = {}
    count = held = 0
    for done, (name, shape) in enumerate(shapes.items(), 1):
        norm = len(shape) == 1
        scale = 0.05 if norm else int(np.prod(shape[1:])) ** -0.5
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= scale
        if norm and ("layer_norm" in name or "layernorm" in name) and name.startswith("vision") and name.endswith("weight"):
            values += 1
        shard[name] = values.astype(ml_dtypes.bfloat16)
        held += shard[name].nbytes
        on_progress(done, len(shapes))
        if held >= SHARD_BYTES or done == len(shapes):
            count += 1
            file = f"model-{count:05d}.safetensors"
            save_file(shard, out / file, metadata={"format": "pt"})
            shard_of |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    size = config.vision.image_size
    preprocessor = {"size": {"height": size, "width": size}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    _tokenizer(config.text.vocab_size).save(str(out / "tokenizer.json"))


def _tokenizer(vocab_size: int) -> Any:
    """A tokenizer of full size: one token per character, the rest filler, so that loading it takes as long as the real one."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, "\n", *map(chr, range(32, 127))]
    tokens += [f"filler{i}" for i in range(vocab_size - 64 - len(tokens))] + ["<image>"]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*special, "<image>"]])
    return tokenizer
