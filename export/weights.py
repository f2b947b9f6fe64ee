"""One table: which checkpoint tensors become which graph initializer, and how. Strict both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pgfast.errors import WeightMismatchError

from .config import PaliGemmaConfig, TextConfig, VisionConfig
from .gemma import rotary_tables
from .tensors import Array, Checkpoint

EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


_NORMS = {
    "gemma": {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    # the same name means another place: Gemma 2's post_attention_layernorm is behind the attention, before the addition
    "gemma2": {
        "input_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}
"""Our norms and transformers' names for them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One graph initializer and where it comes from."""

    parameter: str
    """Name in the graph."""
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    """Checkpoint tensors with the shapes the config asks for; none for a computed table."""
    layout: Callable[[Sequence[Array]], Array]
    """Puts the tensors, already in the graph's type, in the graph's order."""
    plus_one: bool = False
    """RMSNorm multiplies by 1 + w (GemmaRMSNorm.forward); the one is added in fp32."""
    computed: Array | None = None
    """The values of a table that follows from the config alone."""

    def raw_rows(self, checkpoint: Checkpoint) -> Iterator[Array]:
        """Read a matrix as torch stores it, [out, in] float32, several on top of each other, in runs of rows."""
        for name, _ in self.sources:
            yield from checkpoint.pieces(name)

    def pieces(self, checkpoint: Checkpoint, cast: Callable[[Array], Array]) -> Iterator[Array]:
        """Make the initializer, in pieces along its first axis where that saves memory.

        Args:
            checkpoint: The tensors.
            cast: float32 to the graph's type; applied first, so that only narrow data is moved.
        """
        if self.computed is not None:
            yield cast(self.computed)
            return
        if self.layout is _copy and not self.plus_one:
            yield from map(cast, checkpoint.pieces(self.sources[0][0]))
            return
        tensors = (checkpoint.read(name) for name, _ in self.sources)
        yield self.layout([cast(tensor + np.float32(1) if self.plus_one else tensor) for tensor in tensors])


def _copy(tensors: Sequence[Array]) -> Array:
    return tensors[0]


def _transpose(tensors: Sequence[Array]) -> Array:
    """[out, in] (torch) to [in, out] (MatMul); several are put side by side."""
    out = np.empty((tensors[0].shape[1], sum(len(tensor) for tensor in tensors)), tensors[0].dtype)
    at = 0
    for tensor in tensors:
        for first in range(0, len(tensor), 32):  # 32 rows at a time stay in the cache: three times as fast as .T
            rows = tensor[first : first + 32]
            out[:, at : at + len(rows)] = rows.T
            at += len(rows)
    return out


def _concat(tensors: Sequence[Array]) -> Array:
    return np.concatenate(tensors, axis=0)


def _patches(tensors: Sequence[Array]) -> Array:
    """Convolution kernel [W, C, p, p] to a matrix [C * p * p, W]."""
    return tensors[0].reshape(len(tensors[0]), -1).T


def vision_rows(config: PaliGemmaConfig) -> Iterator[Row]:
    """Initializers of the vision encoder's graph."""
    v: VisionConfig = config.vision
    w, inner, tower = v.hidden_size, v.intermediate_size, "vision_tower"
    patch = f"{tower}.embeddings.patch_embedding"
    yield Row("embedding.projection.weight", ((f"{patch}.weight", (w, v.num_channels, v.patch_size, v.patch_size)),), _patches)
    yield Row("embedding.projection.bias", ((f"{patch}.bias", (w,)),), _copy)
    yield Row("embedding.position", ((f"{tower}.embeddings.position_embedding.weight", (v.num_image_tokens, w)),), _copy)
    for i in range(v.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"{tower}.encoder.layers.{i}"
        for norm, source in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
            for part in ("weight", "bias"):
                yield Row(f"{ours}.{norm}.{part}", ((f"{theirs}.{source}.{part}", (w,)),), _copy)
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        yield Row(f"{ours}.attention.qkv.weight", tuple((f"{name}.weight", (w, w)) for name in qkv), _transpose)
        yield Row(f"{ours}.attention.qkv.bias", tuple((f"{name}.bias", (w,)) for name in qkv), _concat)
        yield from _linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj", w, w)
        yield from _linear(f"{ours}.fc1", f"{theirs}.mlp.fc1", w, inner)
        yield from _linear(f"{ours}.fc2", f"{theirs}.mlp.fc2", inner, w)
    for part in ("weight", "bias"):
        yield Row(f"post_norm.{part}", ((f"{tower}.post_layernorm.{part}", (w,)),), _copy)
    yield from _linear("projector", "multi_modal_projector.linear", w, config.text.hidden_size)


def decoder_rows(config: PaliGemmaConfig) -> Iterator[Row]:
    """Initializers of the decoder's graph."""
    t: TextConfig = config.text
    d, inner, model = t.hidden_size, t.intermediate_size, "language_model"
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    yield Row("embed_tokens.weight", ((EMBEDDING, (t.vocab_size, d)),), _copy)
    cos, sin = rotary_tables(t)
    yield Row("rotary.cos", (), _copy, computed=cos)
    yield Row("rotary.sin", (), _copy, computed=sin)
    for i in range(t.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"{model}.layers.{i}"
        for norm, source in _NORMS[t.model_type].items():
            yield Row(f"{ours}.{norm}.weight", ((f"{theirs}.{source}.weight", (d,)),), _copy, plus_one=True)
        sources = tuple((f"{theirs}.self_attn.{x}_proj.weight", (rows, d)) for x, rows in (("q", q), ("k", kv), ("v", kv)))
        yield Row(f"{ours}.attention.qkv.weight", sources, _transpose)
        yield Row(f"{ours}.attention.out.weight", ((f"{theirs}.self_attn.o_proj.weight", (d, q)),), _transpose)
        for part, shape in (("gate", (inner, d)), ("up", (inner, d)), ("down", (d, inner))):
            yield Row(f"{ours}.mlp.{part}.weight", ((f"{theirs}.mlp.{part}_proj.weight", shape),), _transpose)
    yield Row("norm.weight", ((f"{model}.norm.weight", (d,)),), _copy, plus_one=True)
    if not t.tied:
        yield Row("lm_head.weight", ((HEAD, (t.vocab_size, d)),), _copy)


def _linear(ours: str, theirs: str, size_in: int, size_out: int) -> Iterator[Row]:
    yield Row(f"{ours}.weight", ((f"{theirs}.weight", (size_out, size_in)),), _transpose)
    yield Row(f"{ours}.bias", ((f"{theirs}.bias", (size_out,)),), _copy)


def settle_head(config: PaliGemmaConfig, checkpoint: Checkpoint) -> PaliGemmaConfig:
    """Decide whether the vocabulary head is the embedding: the stored tensors say it, config.json only hints.

    transformers keeps a head that is stored and differs from the embedding, whatever tie_word_embeddings says.
    """
    names = checkpoint.names()
    if not {EMBEDDING, HEAD} <= names or checkpoint.shape(EMBEDDING) != checkpoint.shape(HEAD):
        return config
    for name in (EMBEDDING, HEAD):
        checkpoint.check_dtype(name)
    pairs = zip(checkpoint.pieces(EMBEDDING), checkpoint.pieces(HEAD), strict=True)
    same = all(np.array_equal(embedding, head) for embedding, head in pairs)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tied=same))


def check_weights(checkpoint: Checkpoint, rows: Sequence[Row], *, tied: bool) -> None:
    """Compare the checkpoint with the table before anything is written.

    Raises:
        WeightMismatchError: Tensors are missing, unexpected, or have another shape than the config says.
    """
    wanted = {name: shape for row in rows for name, shape in row.sources}
    have = checkpoint.names() - ({HEAD} if tied else set())  # a tied head saved all the same is a copy
    problems = []
    if missing := sorted(set(wanted) - have):
        problems.append(f"missing: {some(missing)}")
    if extra := sorted(have - set(wanted)):
        problems.append(f"unexpected: {some(extra)}")
    for name in sorted(have & set(wanted)):
        checkpoint.check_dtype(name)
    problems += [
        f"{name} has shape {list(checkpoint.shape(name))} where config.json asks for {list(wanted[name])}"
        for name in sorted(have & set(wanted))
        if checkpoint.shape(name) != wanted[name]
    ]
    if problems:
        raise WeightMismatchError("the checkpoint does not fit its config.json; " + some(problems, 3, "; "))


def some(items: Sequence[str], most: int = 4, joint: str = ", ") -> str:
    """Join the first few; how many more there are comes last."""
    more = f"{joint}and {len(items) - most} more" if len(items) > most else ""
    return joint.join(items[:most]) + more
