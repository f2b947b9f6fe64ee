"""`--layout transformers.js`: the folder that the npm package @huggingface/transformers (4.0 or newer) loads.

Three graphs under `onnx/`, in ONNX operators alone: `vision_encoder`, `embed_tokens`, `decoder_model_merged`, with names and
scales as in the published exports. The package joins text and image embeddings itself, so both leave their graphs as the
checkpoint has them, in fp32, the image features divided by sqrt(D) because the decoder multiplies everything by it. The
decoder has no attention mask: it attends to everything, which is PaliGemma's rule for one prompt or for several of equal
length, and wrong for padded ones.

Shapes: B batch, S new positions, P image tokens, D hidden size, K key/value heads, H head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn
from tokenizers import Tokenizer

from pgfast.errors import ExportError
from pgfast.manifest import TOKENIZER, ImageSpec

from . import weights
from .build import appears_whole, check_disk, write_weights
from .checkpoint import read_json
from .config import PaliGemmaConfig, TextConfig
from .data_file import DataFile
from .gemma import DecoderLayer, Positions, RotaryTables, SelfAttention
from .graphs import Dims, Graph, finish_graph, new_graph, new_value
from .layers import PLAIN, Dialect, Op, RMSNorm, VocabularyTable
from .plan import ExportOptions, Plan, make_plan
from .precision import FLOATS
from .siglip import VisionEncoder

VISION_ENCODER, EMBED_TOKENS, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
SUFFIX = {"fp32": "", "fp16": "_fp16"}
"""What the package appends to a graph's name for a `dtype`."""
IMAGE_TOKEN = "<image>"
_BATCH, _NEW, _PAST = "batch_size", "sequence_length", "past_sequence_length"
"""The package makes the empty cache from these names: it knows `batch_size`, every other open size becomes 0."""
_END = 2**63 - 1


class ConcatAttention(SelfAttention):
    """Attention over a cache that grows by concatenation, as the package keeps it; every position sees every other."""

    def _attend_standard(
        self, op: Op, qkv: ir.Value, past: tuple[ir.Value, ir.Value], p: Positions
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        c = self._config
        q, k, v = self.rotated_heads(op, qkv, p)
        key, value = op.Concat(past[0], k, axis=2), op.Concat(past[1], v, axis=2)  # [B, K, past + S, H]
        y = op.Attention(q, key, value, scale=c.attention_scale, softcap=c.attn_logit_softcapping or 0.0)
        return self.join_heads(op, y), key, value


class ConcatLayer(DecoderLayer):
    """A decoder layer with that attention."""

    def __init__(self, config: TextConfig, dtype: ir.DataType) -> None:
        super().__init__(config, dtype, Dialect.STANDARD, PLAIN)
        self.attention = ConcatAttention(config, dtype, Dialect.STANDARD, PLAIN)


class EmbedTokens(nn.Module):
    """The embedding as stored, unscaled."""

    def __init__(self, config: TextConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.embed_tokens = VocabularyTable(config.vocab_size, config.hidden_size, dtype, PLAIN, embeds=True, projects=False)

    def forward(self, op: Op, input_ids: ir.Value) -> ir.Value:
        """int64 [B, S] to float32 [B, S, D]."""
        return op.Cast(self.embed_tokens(op, input_ids), to=ir.DataType.FLOAT.value)


class MergedDecoder(nn.Module):
    """Scaling, layers, final norm and vocabulary head over embeddings."""

    def __init__(self, config: TextConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.rotary = RotaryTables(config, dtype)
        self.layers = nn.ModuleList([ConcatLayer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, Dialect.STANDARD)
        self.lm_head = VocabularyTable(config.vocab_size, config.hidden_size, dtype, PLAIN, embeds=False, projects=True)
        self._config, self._dtype = config, dtype

    def forward(
        self,
        op: Op,
        inputs_embeds: ir.Value,
        position_ids: ir.Value,
        num_logits_to_keep: ir.Value,
        past: list[tuple[ir.Value, ir.Value]],
    ) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]]]:
        """Run the decoder.

        Args:
            op: The builder.
            inputs_embeds: float32 [B, S, D].
            position_ids: int64 [B, S], counted from 1.
            num_logits_to_keep: int64 scalar, how many of the last positions get logits; 0 for all.
            past: Caches of each layer, [B, K, past, H].

        Returns:
            (logits float32 [B, kept, V], caches).
        """
        # in fp32 and rounded once: the same number as a product in the compute type
        hidden = op.Cast(op.Mul(inputs_embeds, _scale(self._config, self._dtype)), to=self._dtype.value)
        cos, sin = self.rotary(op)
        positions = Positions(cos, sin, position_ids=op.Sub(position_ids, 1))
        residual: ir.Value | None = None
        present = []
        for layer, cache in zip(self.layers, past, strict=True):
            hidden, residual, key, value = layer(op, hidden, residual, cache, positions, None)
            present.append((key, value))
        normed, _ = self.norm(op, hidden, residual)
        normed = op.Slice(normed, op.Neg(op.Reshape(num_logits_to_keep, [1])), [_END], [1])  # 0: from the start
        logits = self.lm_head(op, None, op.Reshape(normed, [-1, self._config.hidden_size]))
        logits = op.Cast(logits, to=ir.DataType.FLOAT.value)
        if (cap := self._config.final_logit_softcapping) is not None:
            logits = op.Mul(op.Tanh(op.Mul(logits, 1 / cap)), cap)
        shape = op.Concat(op.Shape(normed, start=0, end=2), [self._config.vocab_size], axis=0)
        return op.Reshape(logits, shape), present


def _scale(config: TextConfig, dtype: ir.DataType) -> float:
    """sqrt(D), rounded to the compute type (GemmaTextScaledWordEmbedding.forward)."""
    return float(np.float32(config.hidden_size**0.5).astype(dtype.numpy()))


def build_graphs(config: PaliGemmaConfig, dtype: ir.DataType) -> dict[str, Graph]:
    """Return the three graphs; caches are in `dtype`, everything else that goes in or out is fp32."""
    return {
        VISION_ENCODER: _vision_encoder(config, dtype),
        EMBED_TOKENS: _embed_tokens(config.text, dtype),
        DECODER: _decoder(config.text, dtype),
    }


def _vision_encoder(config: PaliGemmaConfig, dtype: ir.DataType) -> Graph:
    vision, float32 = config.vision, ir.DataType.FLOAT
    pixel_values = new_value("pixel_values", float32, [_BATCH, vision.num_channels, vision.image_size, vision.image_size])
    graph = new_graph(VISION_ENCODER, [pixel_values])
    op = GraphBuilder(graph).op
    features = op.Div(VisionEncoder(config, dtype, float32, Dialect.STANDARD)(op, pixel_values), _scale(config.text, dtype))
    return Graph(
        finish_graph(
            graph, {"image_features": (features, float32, [_BATCH, vision.num_image_tokens, config.text.hidden_size])}
        ),
        {},
    )


def _embed_tokens(text: TextConfig, dtype: ir.DataType) -> Graph:
    input_ids = new_value("input_ids", ir.DataType.INT64, [_BATCH, _NEW])
    graph = new_graph(EMBED_TOKENS, [input_ids])
    embeds = EmbedTokens(text, dtype)(GraphBuilder(graph).op, input_ids)
    return Graph(finish_graph(graph, {"inputs_embeds": (embeds, ir.DataType.FLOAT, [_BATCH, _NEW, text.hidden_size])}), {})


def _decoder(text: TextConfig, dtype: ir.DataType) -> Graph:
    int64, float32 = ir.DataType.INT64, ir.DataType.FLOAT
    inputs_embeds = new_value("inputs_embeds", float32, [_BATCH, _NEW, text.hidden_size])
    position_ids, keep = new_value("position_ids", int64, [_BATCH, _NEW]), new_value("num_logits_to_keep", int64, [])
    cache: Dims = [_BATCH, text.num_key_value_heads, _PAST, text.head_dim]
    past = [
        (new_value(f"past_key_values.{i}.key", dtype, cache), new_value(f"past_key_values.{i}.value", dtype, cache))
        for i in range(text.num_hidden_layers)
    ]
    inputs = [inputs_embeds, position_ids, keep, *(value for pair in past for value in pair)]
    graph = new_graph(DECODER, inputs)
    logits, present = MergedDecoder(text, dtype)(GraphBuilder(graph).op, inputs_embeds, position_ids, keep, past)
    outputs: dict[str, tuple[ir.Value, ir.DataType, Dims]] = {
        "logits": (logits, float32, [_BATCH, "num_logits", text.vocab_size]),
    }
    grown: Dims = [_BATCH, text.num_key_value_heads, "total_sequence_length", text.head_dim]
    for i, (key, value) in enumerate(present):
        outputs[f"present.{i}.key"], outputs[f"present.{i}.value"] = (key, dtype, grown), (value, dtype, grown)
    return Graph(finish_graph(graph, outputs), {})


def _rows(config: PaliGemmaConfig) -> dict[str, list[weights.Row]]:
    """The weight table by graph; a tied head is written twice, because two files need it."""
    embedding, *rest = weights.decoder_rows(config)
    assert embedding.parameter == "embed_tokens.weight"
    head = [dataclasses.replace(embedding, parameter="lm_head.weight")] if config.text.tied else []
    return {VISION_ENCODER: list(weights.vision_rows(config)), EMBED_TOKENS: [embedding], DECODER: rest + head}


def export_transformersjs(
    checkpoint: str, out: Path, options: ExportOptions, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Write the folder; returns the bytes of its files.

    Args:
        checkpoint: A local Hugging Face folder, or a Hub id.
        out: Folder to create; it must not exist.
        options: Only the precision counts.
        on_progress: Called with (bytes written, bytes in all) as weights are written.

    Raises:
        ExportError: The checkpoint is not usable, `out` exists, or the disk is full. Nothing is left behind.
        WeightMismatchError: Tensors do not fit the config.
    """
    if options.precision not in SUFFIX:
        raise ExportError(f"precision {options.precision} does not fit transformers.js: choose one of {', '.join(SUFFIX)}")
    if out.is_symlink() or out.exists():
        raise ExportError(f"{out} exists: choose another folder or remove it")
    bundle = make_plan(checkpoint, options)  # the same checks; only its graphs differ
    built = build_graphs(bundle.config, FLOATS[options.precision])
    plan = dataclasses.replace(bundle, graphs=built, rows=_rows(bundle.config))
    settings = {name: _to_json(content, name) for name, content in _settings(plan, options.precision).items()}
    done, total = 0, plan.total_bytes

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    check_disk(out, total)
    with appears_whole(out) as partial:
        (partial / "onnx").mkdir()
        for name, graph in plan.graphs.items():
            path = partial / "onnx" / f"{name}{SUFFIX[options.precision]}.onnx"
            with DataFile(path.with_name(f"{path.name}_data"), on_bytes) as data:
                write_weights(graph, plan.rows[name], plan.tensors, data)
                data.finish()
            ir.save(graph.model, path)
        for file, content in settings.items():
            (partial / file).write_bytes(content)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file."""
    content = read_json(path)
    if content is not None and not isinstance(content, dict):
        raise ExportError(f"{path.name} is not a JSON object")
    return content or {}


def _to_json(content: dict[str, Any], name: str) -> bytes:
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError as error:  # NaN, or half a character
        raise ExportError(f"{name} of the checkpoint holds what JSON cannot: {error}") from error


def _settings(plan: Plan, precision: str) -> dict[str, Any]:
    """The JSON files: what the checkpoint has, and what the package takes from them and transformers does not write."""
    folder, config = plan.source.path, plan.config
    raw, generation = _read_object(folder / "config.json"), _read_object(folder / "generation_config.json")
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # transformers leaves out what equals its defaults; the package has no defaults
    text_keys = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    text = {key: getattr(config.text, key) for key in (*text_keys, "num_key_value_heads", "head_dim")}
    package = {
        "dtype": precision,
        "use_external_data_format": True,  # one .onnx_data beside each graph
        "kv_cache_dtype": {"fp16": "float16"},  # read before 4.3, which asks the graph
    }
    config_json = {
        **raw,
        **ids,
        "image_token_index": config.image_token_id,
        "text_config": {**(raw.get("text_config") or {}), **text},
        "transformers.js_config": package,
    }
    return {
        "config.json": config_json,
        "generation_config.json": {**ids, **generation},
        "preprocessor_config.json": _preprocessor(plan.manifest.image, config.vision.num_image_tokens),
        TOKENIZER: _tokenizer(folder),
        "tokenizer_config.json": _tokenizer_config(folder, config),
    }


def _preprocessor(image: ImageSpec, num_image_tokens: int) -> dict[str, Any]:
    return {
        "processor_class": "PaliGemmaProcessor",
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": num_image_tokens,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image.size, "width": image.size},
        "resample": {"bilinear": 2, "bicubic": 3}[image.resampling],
        "do_rescale": True,
        "rescale_factor": image.rescale_factor,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Without a post-processor: the package's processor writes <bos> itself, and PaliGemma 1's tokenizer adds another."""
    return {**_read_object(folder / TOKENIZER), "post_processor": None}


def _tokenizer_config(folder: Path, config: PaliGemmaConfig) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    if (found := tokenizer.token_to_id(IMAGE_TOKEN)) != config.image_token_id:
        raise ExportError(f"{TOKENIZER} gives {IMAGE_TOKEN} the id {found}, config.json says {config.image_token_id}")
    tokens = {
        "bos_token": tokenizer.id_to_token(config.bos_token_id),
        "eos_token": tokenizer.id_to_token(config.eos_token_id),
        "pad_token": tokenizer.id_to_token(config.pad_token_id),
    }
    defaults = {"tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    fixed = {"processor_class": "PaliGemmaProcessor", "add_bos_token": False, "add_eos_token": False}
    return {**defaults, **_read_object(folder / "tokenizer_config.json"), **tokens, **fixed}
