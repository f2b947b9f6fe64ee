"""`config.json` of a Hugging Face PaliGemma checkpoint as frozen dataclasses.

Hugging Face writes only what differs from its defaults, so the fallbacks below repeat transformers' defaults (a test
compares them). A key that is neither read nor known to be harmless is an error: it could change the function.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgfast.errors import ExportError

VISION_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
"""Defaults of transformers' SiglipVisionConfig."""
_GEMMA: dict[str, Any] = {
    "vocab_size": 256000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": _GEMMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": _GEMMA
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": None,
    },
}
"""Defaults of transformers' GemmaConfig (PaliGemma 1) and Gemma2Config (PaliGemma 2), by model_type."""
ROPE_THETA = 10000.0

_HARMLESS = {
    # said elsewhere, or about training, storage and generation settings only
    *("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype", "model_type", "use_cache"),
    *("attention_dropout", "initializer_range", "_attn_implementation_autoset", "return_dict", "output_attentions"),
    *("output_hidden_states", "vocab_size", "ignore_index", "hidden_size", "projection_dim", "num_image_tokens"),
    *("projector_hidden_act", "is_encoder_decoder", "cache_implementation", "id2label", "label2id", "_vocab_size"),
    *("chunk_size_feed_forward", "problem_type", "hidden_activation", "tie_word_embeddings", "rope_theta"),
    *("rope_parameters", "rope_scaling", "vision_use_head", "use_bidirectional_attention", "quantization_config"),
    *("pad_token_id", "eos_token_id", "bos_token_id", "image_token_index", "image_token_id", "text_config", "vision_config"),
}


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The SigLIP tower."""

    image_size: int
    patch_size: int
    num_channels: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float

    @property
    def num_image_tokens(self) -> int:
        """P: one token per patch."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The Gemma (PaliGemma 1) or Gemma 2 (PaliGemma 2) decoder."""

    model_type: str
    """gemma or gemma2; a Gemma 2 layer has two more norms, behind attention and feed-forward."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    """The vocabulary head is the embedding itself."""
    attention_scale: float
    """Factor of the attention scores."""
    attn_logit_softcapping: float | None
    """Scores become cap * tanh(score / cap); None: no cap."""
    final_logit_softcapping: float | None
    """The same for the logits."""
    sliding_window: int | None
    """Attention span of transformers' Gemma 2 while decoding (`plan.check_window`)."""


@dataclass(frozen=True, slots=True)
class PaliGemmaConfig:
    """Everything the graphs and the manifest need from `config.json`."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


def read_config(path: Path) -> PaliGemmaConfig:
    """Read `config.json`.

    Raises:
        ExportError: Not a PaliGemma config, or one that says something this exporter does not know.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"no config.json in {path.parent}: not a Hugging Face checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    return parse_config(raw)


def parse_config(raw: Any) -> PaliGemmaConfig:
    """Turn the parsed `config.json` into a `PaliGemmaConfig` (raises as `read_config`)."""
    if not isinstance(raw, dict) or raw.get("model_type") != "paligemma":
        kind = raw.get("model_type", "nothing") if isinstance(raw, dict) else type(raw).__name__
        raise ExportError(f"not a PaliGemma checkpoint: config.json says model_type {kind!r}")
    vision_raw, text_raw = raw.get("vision_config") or {}, raw.get("text_config") or {}
    if not isinstance(vision_raw, dict) or not isinstance(text_raw, dict):
        raise ExportError("config.json: vision_config and text_config must be objects")
    kind = text_raw.get("model_type", "gemma")
    if not isinstance(kind, str) or kind not in TEXT_DEFAULTS:
        raise ExportError(f"text_config.model_type is {kind!r}: only {' and '.join(TEXT_DEFAULTS)} are supported")
    _refuse_unknown("config.json", raw, set())
    _refuse_unknown("vision_config", vision_raw, set(VISION_DEFAULTS))
    _refuse_unknown("text_config", text_raw, set(TEXT_DEFAULTS[kind]))
    vision, text = VISION_DEFAULTS | vision_raw, TEXT_DEFAULTS[kind] | text_raw
    _require("vision_config.model_type", vision_raw.get("model_type", "siglip_vision_model"), "siglip_vision_model")
    _require("vision_config.hidden_act", vision["hidden_act"], "gelu_pytorch_tanh")
    _require("vision_config.vision_use_head", vision_raw.get("vision_use_head", False), False)
    activation = text.get("hidden_activation") or text.get("hidden_act")
    # "gelu" in early Gemma 1 files means the tanh form all the same (GemmaConfig.__post_init__)
    if not (kind == "gemma" and activation == "gelu"):
        _require("text_config's activation", activation, "gelu_pytorch_tanh")
    _require("text_config.attention_bias", text["attention_bias"], False)
    _require("quantization_config", raw.get("quantization_config"), None)
    tied = raw.get("tie_word_embeddings", True)
    _require("tie_word_embeddings", isinstance(tied, bool), True)
    # the ids are at the top in older files, in text_config in newer ones
    ids = {key: raw[key] if raw.get(key) is not None else text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = PaliGemmaConfig(
        vision=VisionConfig(**{key: vision[key] for key in VisionConfig.__dataclass_fields__}),
        text=_text_config(kind, text, tied=tied),
        image_token_id=raw["image_token_index"] if "image_token_index" in raw else raw.get("image_token_id", 256000),
        **ids,
    )
    _check(config)
    return config


def _text_config(kind: str, text: dict[str, Any], *, tied: bool) -> TextConfig:
    derived = {
        "model_type",
        "rope_theta",
        "tied",
        "attention_scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "sliding_window",
    }
    scalar = text.get("query_pre_attn_scalar", text["head_dim"])
    if not _is_positive(scalar):
        raise ExportError(f"text_config: head_dim or query_pre_attn_scalar is {scalar!r}: a positive number is needed")
    window = text.get("sliding_window")
    if window is not None and not (isinstance(window, int) and _is_positive(window)):
        raise ExportError(f"text_config.sliding_window is {window!r}: a positive whole number or null is needed")
    caps = [text.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")]
    if any(cap is not None and not _is_positive(cap) for cap in caps):
        raise ExportError(f"text_config: the softcaps are {caps}: positive numbers or null are needed")
    return TextConfig(
        **{key: text[key] for key in TextConfig.__dataclass_fields__ if key not in derived},
        model_type=kind,
        rope_theta=_rope_theta(text),
        tied=tied,
        attention_scale=float(scalar) ** -0.5,
        attn_logit_softcapping=caps[0],
        final_logit_softcapping=caps[1],
        sliding_window=window,
    )


def _refuse_unknown(where: str, raw: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(raw) - known - _HARMLESS)
    if unknown:
        raise ExportError(f"{where} has keys this exporter does not know, they could change the model: {', '.join(unknown)}")


def _require(what: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise ExportError(f"{what} is {value!r}: only {wanted!r} is supported")


def _rope_theta(text: dict[str, Any]) -> float:
    """The base of the rotary embedding, from either place where transformers has written it."""
    rope = text.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ExportError("text_config.rope_parameters must be an object")
    _require("text_config.rope_parameters.rope_type", rope.get("rope_type", "default"), "default")
    _require("text_config.rope_scaling", text.get("rope_scaling"), None)
    theta = rope.get("rope_theta", text.get("rope_theta", ROPE_THETA))
    if not _is_positive(theta):
        raise ExportError(f"text_config: rope_theta is {theta!r}: a positive number is needed")
    return float(theta)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**24


def _check(config: PaliGemmaConfig) -> None:
    """Refuse numbers that no model can have."""
    for name, part in (("vision_config", config.vision), ("text_config", config.text)):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.type == "int" and (not isinstance(value, int) or not _is_positive(value)):
                raise ExportError(f"{name}.{field.name} is {value!r}: a positive whole number is needed")
            if field.type == "float" and not _is_positive(value):
                raise ExportError(f"{name}.{field.name} is {value!r}: a positive number is needed")
    for key in ("image_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        if not isinstance(getattr(config, key), int) or isinstance(getattr(config, key), bool):
            raise ExportError(f"config.json: {key} is {getattr(config, key)!r}, an integer is needed")
    vision, text = config.vision, config.text
    if vision.image_size % vision.patch_size:
        raise ExportError(f"image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}")
    if vision.hidden_size % vision.num_attention_heads:
        raise ExportError("vision_config.hidden_size is not a multiple of num_attention_heads")
    if text.num_attention_heads % text.num_key_value_heads:
        raise ExportError("text_config.num_attention_heads is not a multiple of num_key_value_heads")
    if max(text.num_hidden_layers, vision.num_hidden_layers) >= 1000 or text.head_dim > 1024 or text.head_dim % 2:
        raise ExportError("layers under 1000 and an even head_dim of at most 1024 are needed")
    if vision.num_channels != 3:
        raise ExportError(f"vision_config.num_channels is {vision.num_channels}: only 3 is supported")
    if text.max_position_embeddings > 2**18:
        raise ExportError(f"max_position_embeddings {text.max_position_embeddings} is beyond anything that was trained")
    if text.max_position_embeddings < vision.num_image_tokens + 32:
        raise ExportError("max_position_embeddings leaves no room for a prompt behind the image")
