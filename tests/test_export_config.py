"""config.json: the defaults of transformers, and the published shapes."""

from __future__ import annotations

import pytest
from pgfast.bench.synth import MODELS, config_of
from pgfast.export.config import TEXT_DEFAULTS, VISION_DEFAULTS, parse_config
from pgfast.export.plan import check_window
from pgfast.export.precision import choose


def test_defaults_are_those_of_transformers() -> None:
    from transformers import Gemma2Config, GemmaConfig, SiglipVisionConfig

    gemma, gemma2 = TEXT_DEFAULTS["gemma"], TEXT_DEFAULTS["gemma2"]
    for ours, theirs in ((VISION_DEFAULTS, SiglipVisionConfig()), (gemma, GemmaConfig()), (gemma2, Gemma2Config())):
        for key, value in ours.items():
            assert key == "layer_types" or getattr(theirs, key) == value, key


PUBLISHED = {
    "_name_or_path": "final-hf/paligemma-3b-pt-224-main",
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 257216,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.41.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
}
"""config.json as Google published it with paligemma-3b-pt-224."""


def test_the_published_config_gives_the_published_dimensions() -> None:
    config = parse_config(PUBLISHED)
    assert config.vision.num_image_tokens == 256
    assert (config.vision.image_size, config.vision.patch_dim) == (224, 588)
    assert (config.text.head_dim, config.text.max_position_embeddings, config.text.rope_theta) == (256, 8192, 10000.0)
    assert config.text.tied
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.image_token_id) == (2, 1, 0, 257152)


@pytest.mark.parametrize("model", MODELS)
def test_every_published_shape_is_taken(model: str) -> None:
    """PaliGemma 1 and 2 at 224, 448 and 896 pixels; 896 is beyond Gemma 2's window, which is not the model's."""
    config = parse_config(config_of(model))
    size = int(model.rsplit("-", 1)[1])
    assert config.vision.num_image_tokens == (size // 14) ** 2
    check_window(config.text.sliding_window, config.vision.num_image_tokens + 256)
    assert config.text.model_type == ("gemma2" if model.startswith("2-") else "gemma")
    for precision, target in (("int4", "cpu"), ("int8", "cpu"), ("int4", "cuda"), ("int4", "tensorrt"), ("bf16", "cuda")):
        assert choose(precision, None, target, config.text).storage.block in (16, 32)
