"""A tiny PaliGemma: the real architecture at about a million parameters, with a word-level tokenizer.

It is what the embedded demo bundle is trained from. `save_checkpoint` writes a normal Hugging Face folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgfast.manifest import ImageSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Ids 0 to 3, in Gemma's order."""
LOCATION_TOKENS = tuple(f"<loc{bin:04d}>" for bin in range(1024))
SEGMENT_TOKENS = tuple(f"<seg{code:03d}>" for code in range(128))
IMAGE_TOKEN = "<image>"
VOCAB_SIZE = 1280
"""Rows of the embedding: the tokens above, the words of the data, the rest unused (as in the real checkpoints)."""
IMAGE_SIZE, PATCH_SIZE = 64, 8
IMAGE_SPEC = ImageSpec(IMAGE_SIZE, [0.5] * 3, [0.5] * 3, 1 / 255, "bicubic")


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Build a word-level tokenizer over the words of `texts`; a newline is a token, other white space is dropped."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.lower())} - {"\n"})
    tokens = [*SPECIAL_TOKENS, "\n", *words, *LOCATION_TOKENS, *SEGMENT_TOKENS, IMAGE_TOKEN]
    if len(tokens) > VOCAB_SIZE:
        raise ValueError(f"{len(words)} different words do not fit a vocabulary of {VOCAB_SIZE}")
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # words with spaces between, but none before a comma
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (*SPECIAL_TOKENS, IMAGE_TOKEN)])
    # like the real checkpoints: known to the tokenizer, but not "special"
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (*LOCATION_TOKENS, *SEGMENT_TOKENS)])
    return tokenizer


def build_config(tokenizer: Tokenizer) -> PaliGemmaConfig:
    """Return the configuration of the tiny model; every number that differs from the 3B model is here."""
    from transformers import PaliGemmaConfig

    num_image_tokens = (IMAGE_SIZE // PATCH_SIZE) ** 2
    hidden_size = 128
    return PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_image_tokens": num_image_tokens,
            "projection_dim": hidden_size,
            "projector_hidden_act": "gelu_fast",
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden_size,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_pytorch_tanh",
            "num_image_tokens": num_image_tokens,
            "initializer_range": hidden_size**-0.5,  # 0.02 is for widths of thousands: attention hardly starts to move
        },
        image_token_index=tokenizer.token_to_id(IMAGE_TOKEN),
        projection_dim=hidden_size,
        hidden_size=hidden_size,
        pad_token_id=tokenizer.token_to_id("<pad>"),
        eos_token_id=tokenizer.token_to_id("<eos>"),
        bos_token_id=tokenizer.token_to_id("<bos>"),
        dtype="float32",
    )


def build_model(config: PaliGemmaConfig) -> PaliGemmaForConditionalGeneration:
    """Create the model with random weights (transformers' own initialisation)."""
    from transformers import PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.tie_weights()
    return model


def save_checkpoint(folder: Path, model: PaliGemmaForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Write `config.json`, `model.safetensors`, `tokenizer.json` and `preprocessor_config.json`."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor_config(), indent=2) + "\n")


def _preprocessor_config() -> dict[str, Any]:
    """The keys of the published PaliGemma checkpoints, at this model's picture size."""
    return {
        "processor_class": "PaliGemmaProcessor",
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
