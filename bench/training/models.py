"""PaliGemmas with random weights whose parts cost what they are meant to: dimensions, arithmetic, and a checkpoint on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgfast.errors import MissingDependencyError

from ..cost import Cost
from .settings import CACHED, OURS, PUBLIC

LOCATIONS = tuple(f"<loc{bin:04d}>" for bin in range(1024))
SEGMENTS = tuple(f"<seg{code:03d}>" for code in range(128))
ROWS_AFTER_IMAGE_TOKEN = 63
"""Unused rows at the end of the published embeddings: 257,216 with `<image>` at 257,152."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of a PaliGemma; one key and value head, as Gemma 2B has."""

    name: str
    hidden: int
    """D"""
    intermediate: int
    layers: int
    heads: int
    head_dim: int
    vision_hidden: int
    """W"""
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    vocabulary: int = 257216
    """V"""
    image_size: int = 224
    patch_size: int = 14

    @property
    def image_tokens(self) -> int:
        """P, the patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    def digest(self) -> str:
        """Tells folders of different sizes apart."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


MODELS = {
    d.name: d
    for d in (
        # the parts have the shares of the forward pass that they have in the 3B model, the activations its total width
        Dimensions("proportional", 96, 26752, 12, 4, 64, 384, 1536, 10, 6),
        # a small model with the whole vocabulary: the head is most of it
        Dimensions("head-heavy", 256, 2048, 8, 4, 64, 384, 1536, 7, 6),
        Dimensions("tiny", 32, 64, 2, 2, 16, 48, 96, 2, 2, vocabulary=4096, image_size=56),
    )
}


def step_flops(cost: Cost, positions: float, answer_tokens: float) -> dict[str, float]:
    """Return FLOP of one sample's training step by variant; vision tower and projector are frozen, a backward is two forwards.

    Args:
        cost: The model.
        positions: Image, prompt and answer tokens of a sample.
        answer_tokens: Of these, the ones with a loss.
    """
    head = 2.0 * cost.head_params
    layers = cost.prefill_flops(round(positions)) - head
    ours, vision = 3 * (layers + head * answer_tokens), cost.vision_flops()
    # with cached features the projector still runs: below 0.1 % of a step
    return {PUBLIC: 3 * (layers + head * positions) + vision, OURS: ours + vision, CACHED: ours}


def make_checkpoint(d: Dimensions, texts: Iterable[str], folder: Path, seed: int = 0) -> None:
    """Write a Hugging Face folder in fp32 with random weights and a word-level tokenizer.

    Args:
        d: The model.
        texts: All words that the tokenizer must know.
        folder: To create; a folder that is there is kept as it is.
        seed: Of the weights.

    Raises:
        MissingDependencyError: torch or transformers are not installed.
    """
    if folder.exists():
        return
    try:
        import torch
        from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PreTrainedTokenizerFast
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(error.name or "transformers", "train") from error
    logging.disable_progress_bar()
    tokenizer = _tokenizer(d, texts)
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration._from_config(PaliGemmaConfig(**configuration(d)))
    model.tie_weights()
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    ).save_pretrained(partial)
    (partial / "preprocessor_config.json").write_text(json.dumps(_preprocessor(d), indent=2) + "\n")
    partial.rename(folder)


def parameters(folder: Path) -> int:
    """Count the parameters of a checkpoint; the tied matrix is stored once."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118 - not a dict
    return total


def configuration(d: Dimensions) -> dict[str, Any]:
    """Return the arguments of transformers' `PaliGemmaConfig`."""
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": d.image_size,
        "patch_size": d.patch_size,
        "hidden_size": d.vision_hidden,
        "intermediate_size": d.vision_intermediate,
        "num_hidden_layers": d.vision_layers,
        "num_attention_heads": d.vision_heads,
        "projection_dim": d.hidden,
        "vision_use_head": False,
    }
    text = {
        "model_type": "gemma",
        "vocab_size": d.vocabulary,
        "hidden_size": d.hidden,
        "intermediate_size": d.intermediate,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": 1,
        "head_dim": d.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
    }
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": d.vocabulary - ROWS_AFTER_IMAGE_TOKEN - 1,
        "projection_dim": d.hidden,
        "hidden_size": d.hidden,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "dtype": "float32",
    }


def _tokenizer(d: Dimensions, texts: Iterable[str]) -> Any:
    """One token per word; the layout is Gemma's: markers, words, filler, `<loc>`, `<seg>`, `<image>`."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)} - {"\n"})
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, "\n", *words]
    room = d.vocabulary - ROWS_AFTER_IMAGE_TOKEN - 1 - len(SEGMENTS) - len(LOCATIONS)
    tokens += [f"filler{i}" for i in range(room - len(tokens))]
    tokens += [*LOCATIONS, *SEGMENTS, "<image>"]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*special, "<image>"]])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*LOCATIONS, *SEGMENTS)])
    return tokenizer


def _preprocessor(d: Dimensions) -> dict[str, Any]:
    """The keys of the published PaliGemma checkpoints."""
    return {
        "processor_class": "PaliGemmaProcessor",
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": d.image_tokens,
        "do_convert_rgb": None,
        "do_resize": True,
        "size": {"height": d.image_size, "width": d.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
