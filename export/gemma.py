"""The Gemma and Gemma 2 decoders over image features and text, with a KV cache that is written in place.

One graph serves prompt and decoding. The prompt attends all to all and a new token attends to all the past, so the
prefix-LM rule needs no triangular mask: a row's valid length is the whole rule.

Shapes: B batch, P image tokens (0 while decoding), S text tokens, N = P + S new positions, T cache slots, D hidden size,
Q query heads, K key/value heads, H head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from .config import TextConfig
from .layers import ORT_DOMAIN, PLAIN, Dialect, GatedMLP, Linear, Op, RMSNorm, VocabularyTable
from .storage import Storage


@dataclass(frozen=True, slots=True)
class Positions:
    """What every layer's attention needs to know about this run, computed once."""

    cos: ir.Value
    """[max positions, H / 2]; row i is position i + 1, as transformers counts from 1."""
    sin: ir.Value
    seqlens_k: ir.Value | None = None
    """ort: int32 [B], valid length - 1."""
    total_length: ir.Value | None = None
    """ort: int32 scalar; N for a prompt (which tells the operator that it is one), T while decoding."""
    causal: int = 0
    """ort: 1 where there is one new token. That is the same function, and the one CUDA's fastest decoding kernel computes."""
    position_ids: ir.Value | None = None
    """standard: int64 [B, N], rows of cos and sin."""
    write_indices: ir.Value | None = None
    """standard: int64 [B], first cache slot to write."""
    mask: ir.Value | None = None
    """standard: bool [B, 1, N, T], True on valid slots."""


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, over the cache."""

    def __init__(self, config: TextConfig, dtype: ir.DataType, dialect: Dialect, storage: Storage) -> None:
        super().__init__()
        c = config
        qkv_width = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        self.qkv = Linear(c.hidden_size, qkv_width, dtype, storage=storage)
        self.out = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, dtype, storage=storage)
        self._config, self._dtype, self._dialect = config, dtype, dialect

    def forward(
        self, op: Op, x: ir.Value, past: tuple[ir.Value, ir.Value], positions: Positions, last: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend.

        Args:
            op: The builder.
            x: [B, N, D].
            past: Key and value cache, [B, K, T, H] each.
            positions: Lengths and rotary tables.
            last: int64 [B, 1, 1]: keep only this position's output (the last layer).

        Returns:
            (output [B, N or 1, D], present key, present value).
        """
        attend = self._attend_ort if self._dialect is Dialect.ORT else self._attend_standard
        y, key, value = attend(op, self.qkv(op, x), past, positions)  # [B, N, Q * H]
        if last is not None:
            y = op.GatherND(y, last, batch_dims=1)  # [B, 1, Q * H]
        return self.out(op, y), key, value

    def _attend_ort(
        self, op: Op, qkv: ir.Value, past: tuple[ir.Value, ir.Value], p: Positions
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        c = self._config
        y, key, value = op.GroupQueryAttention(
            *(qkv, None, None, *past, p.seqlens_k, p.total_length, p.cos, p.sin),
            num_heads=c.num_attention_heads,
            kv_num_heads=c.num_key_value_heads,
            scale=c.attention_scale,
            softcap=c.attn_logit_softcapping or 0.0,
            do_rotary=1,
            causal=p.causal,
            _domain=ORT_DOMAIN,
            _outputs=3,
        )
        return y, key, value

    def _attend_standard(
        self, op: Op, qkv: ir.Value, past: tuple[ir.Value, ir.Value], p: Positions
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        c = self._config
        q, k, v = self.rotated_heads(op, qkv, p)
        key = op.TensorScatter(past[0], k, p.write_indices, axis=-2)  # [B, K, T, H]
        value = op.TensorScatter(past[1], v, p.write_indices, axis=-2)
        # q and k in 4-D, so the head counts are in the shapes; the mask holds for every query
        if c.attn_logit_softcapping is None:
            y = op.Attention(q, key, value, p.mask, scale=c.attention_scale)  # [B, Q, N, H]
        else:
            y = self._capped(op, q, key, value, p.mask, c.attn_logit_softcapping)
        return self.join_heads(op, y), key, value

    def rotated_heads(self, op: Op, qkv: ir.Value, p: Positions) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Split into heads and rotate: q [B, Q, N, H], k and v [B, K, N, H]."""
        c = self._config
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        q, k, v = op.Split(qkv, [q_width, kv_width, kv_width], axis=-1, _outputs=3)

        def heads(x: ir.Value, count: int) -> ir.Value:  # [B, N, count * H] to [B, count, N, H]
            return op.Transpose(op.Reshape(x, [0, 0, count, c.head_dim]), perm=[0, 2, 1, 3])

        q = op.RotaryEmbedding(heads(q, c.num_attention_heads), p.cos, p.sin, p.position_ids)
        k = op.RotaryEmbedding(heads(k, c.num_key_value_heads), p.cos, p.sin, p.position_ids)
        return q, k, heads(v, c.num_key_value_heads)

    def join_heads(self, op: Op, y: ir.Value) -> ir.Value:
        """[B, Q, N, H] to [B, N, Q * H]."""
        return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, self._config.num_attention_heads * self._config.head_dim])

    def _capped(self, op: Op, q: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None, cap: float) -> ir.Value:
        """Attention with capped scores, spelt out: TensorRT's parser refuses Attention's softcap. Softmax in fp32."""
        c = self._config
        float32, dtype = ir.DataType.FLOAT, self._dtype
        groups = c.num_attention_heads // c.num_key_value_heads
        q = op.Reshape(q, [0, c.num_key_value_heads, groups, -1, c.head_dim])  # [B, K, Q / K, N, H]
        keys = op.Transpose(op.Unsqueeze(key, [2]), perm=[0, 1, 2, 4, 3])  # [B, K, 1, H, T]
        scores = op.Cast(op.MatMul(q, keys), to=float32.value)  # [B, K, Q / K, N, T]
        scores = op.Mul(op.Tanh(op.Mul(scores, c.attention_scale / cap)), cap)
        scores = op.Where(op.Unsqueeze(mask, [1]), scores, -1e30)
        shares = op.Cast(op.Softmax(scores, axis=-1), to=dtype.value)
        y = op.MatMul(shares, op.Unsqueeze(value, [2]))  # [B, K, Q / K, N, H]
        return op.Reshape(y, [0, c.num_attention_heads, -1, c.head_dim])


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each added to the residual stream; Gemma 2 also normalises what is added."""

    def __init__(self, config: TextConfig, dtype: ir.DataType, dialect: Dialect, storage: Storage) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, dialect)

        has_output_norms = config.model_type == "gemma2"
        self.input_norm = norm()
        self.attention = SelfAttention(config, dtype, dialect, storage)
        self.attention_output_norm = norm() if has_output_norms else None
        self.mlp_norm = norm()
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype, dialect, storage)
        self.mlp_output_norm = norm() if has_output_norms else None

    def forward(
        self,
        op: Op,
        x: ir.Value,
        residual: ir.Value | None,
        past: tuple[ir.Value, ir.Value],
        positions: Positions,
        last: ir.Value | None,
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Run one layer; x + residual is its input (residual None: x alone).

        Returns:
            (feed-forward output, residual to add to it, present key, present value).
        """
        normed, total = self.input_norm(op, x, residual)
        attended, key, value = self.attention(op, normed, past, positions, last)
        if last is not None:  # from here on only the last position is needed
            total = op.GatherND(total, last, batch_dims=1)  # [B, 1, D]
        if self.attention_output_norm is not None:
            attended, _ = self.attention_output_norm(op, attended)
        normed, total = self.mlp_norm(op, attended, total)
        y = self.mlp(op, normed)
        if self.mlp_output_norm is not None:
            y, _ = self.mlp_output_norm(op, y)
        return y, total, key, value


class RotaryTables(nn.Module):
    """cos and sin of every position, [max positions, H / 2]; made by `rotary_tables`, not read from a checkpoint."""

    def __init__(self, config: TextConfig, dtype: ir.DataType) -> None:
        super().__init__()
        shape = [config.max_position_embeddings, config.head_dim // 2]
        self.cos = nn.Parameter(shape, dtype)
        self.sin = nn.Parameter(shape, dtype)

    def forward(self, op: Op) -> tuple[ir.Value, ir.Value]:
        """Return the two tables."""
        return self.cos, self.sin


def rotary_tables(config: TextConfig) -> tuple[np.ndarray, np.ndarray]:
    """Compute cos and sin, float32 [max positions, H / 2]; row i is position i + 1 (GemmaRotaryEmbedding, positions from 1)."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inv_freq = np.float32(1) / np.power(np.float32(config.rope_theta), exponent)  # [H / 2]
    position = np.arange(1, config.max_position_embeddings + 1, dtype=np.float32)
    angle = position[:, None] * inv_freq[None, :]
    return np.cos(angle), np.sin(angle)


class Decoder(nn.Module):
    """Embedding, layers, final norm, vocabulary head on the last valid position, greedy choice."""

    def __init__(
        self, config: TextConfig, dtype: ir.DataType, dialect: Dialect, storage: Storage = PLAIN, table_storage: Storage = PLAIN
    ) -> None:
        super().__init__()
        c = config
        self.embed_tokens = VocabularyTable(c.vocab_size, c.hidden_size, dtype, table_storage, embeds=True, projects=c.tied)
        self.rotary = RotaryTables(c, dtype)
        self.layers = nn.ModuleList([DecoderLayer(c, dtype, dialect, storage) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, dialect)
        self.lm_head = (
            None if c.tied else VocabularyTable(c.vocab_size, c.hidden_size, dtype, table_storage, embeds=False, projects=True)
        )
        self._config, self._dtype, self._dialect = config, dtype, dialect

    def forward(
        self,
        op: Op,
        input_ids: ir.Value,
        image_features: ir.Value,
        write_indices: ir.Value,
        kv_lengths: ir.Value,
        past: list[tuple[ir.Value, ir.Value]],
    ) -> tuple[ir.Value, ir.Value, ir.Value, list[tuple[ir.Value, ir.Value]]]:
        """Run the decoder.

        Args:
            op: The builder.
            input_ids: int64 [B, S], right-padded.
            image_features: [B, P, D].
            write_indices: int64 [B], valid positions already in the cache.
            kv_lengths: int64 [B], valid positions after this run.
            past: Caches of each layer.

        Returns:
            (logits float32 [B, V], next_token int64 [B, 1], its log-probability float32 [B, 1], caches).
        """
        if self._dtype is ir.DataType.BFLOAT16:  # numpy has no bfloat16: features cross the border as float32
            image_features = op.Cast(image_features, to=self._dtype.value)
        hidden = op.Concat(image_features, self._embed(op, input_ids), axis=1)  # [B, N, D]
        positions = self._positions(op, hidden, past[0][0], write_indices, kv_lengths)
        last = op.Reshape(op.Sub(op.Sub(kv_lengths, write_indices), 1), [-1, 1, 1])  # [B, 1, 1]
        normed, present = self._run_layers(op, hidden, past, positions, last)
        return *self._choose(op, normed), present

    def _run_layers(
        self,
        op: Op,
        hidden: ir.Value,
        past: list[tuple[ir.Value, ir.Value]],
        positions: Positions,
        last: ir.Value | None,
    ) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]]]:
        """Layers and final norm; returns ([B, 1, D] of the last position, caches)."""
        residual: ir.Value | None = None
        present = []
        for index, layer in enumerate(self.layers):
            is_last = index == self._config.num_hidden_layers - 1
            hidden, residual, key, value = layer(op, hidden, residual, past[index], positions, last if is_last else None)
            present.append((key, value))
        normed, _ = self.norm(op, hidden, residual)
        return normed, present

    def _choose(self, op: Op, normed: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """[B, 1, D] to logits, the greedy choice and its log-probability, so that logits need not leave the device."""
        flat = op.Reshape(normed, [-1, self._config.hidden_size])  # [B, D]
        logits = (self.embed_tokens if self.lm_head is None else self.lm_head)(op, None, flat)
        if self._dtype is not ir.DataType.FLOAT:
            logits = op.Cast(logits, to=ir.DataType.FLOAT.value)
        if (cap := self._config.final_logit_softcapping) is not None:
            logits = op.Mul(op.Tanh(op.Mul(logits, 1 / cap)), cap)
        token = op.ArgMax(logits, axis=-1, keepdims=1)
        return logits, token, op.GatherElements(op.LogSoftmax(logits, axis=-1), token, axis=-1)

    def _embed(self, op: Op, input_ids: ir.Value) -> ir.Value:
        """Embed and scale by sqrt(D), rounded to the compute type first (GemmaTextScaledWordEmbedding.forward)."""
        scale = np.array(self._config.hidden_size**0.5, dtype=np.float32).astype(self._dtype.numpy())
        return op.Mul(self.embed_tokens(op, input_ids), op.Constant(value=ir.tensor(scale)))

    def _positions(
        self, op: Op, hidden: ir.Value, past_key: ir.Value, write_indices: ir.Value, kv_lengths: ir.Value
    ) -> Positions:
        cos, sin = self.rotary(op)
        new = op.Shape(hidden, start=1, end=2)  # [1], N
        slots = op.Shape(past_key, start=2, end=3)  # [1], T
        if self._dialect is Dialect.ORT:
            # from shapes alone, so it stays a host value: on CUDA a computed one would stop graph capture
            one = op.Constant(value=ir.tensor(np.array(1, dtype=np.int64)))  # a plain 1 may become a CastLike, which is one
            total = op.Cast(op.Squeeze(op.Where(op.Greater(new, one), new, slots)), to=ir.DataType.INT32.value)
            seqlens_k = op.Cast(op.Sub(kv_lengths, 1), to=ir.DataType.INT32.value)
            return Positions(cos, sin, seqlens_k=seqlens_k, total_length=total)
        first = op.Unsqueeze(write_indices, [1])  # [B, 1]
        position_ids = op.Add(first, op.Range(0, op.Squeeze(new), 1))  # [B, N]
        # TensorRT's parser ignores Attention's nonpad_kv_seqlen, so the valid length is a mask
        valid = op.Less(op.Range(0, op.Squeeze(slots), 1), op.Reshape(kv_lengths, [-1, 1, 1, 1]))  # [B, 1, 1, T]
        # the same row for every query, written out because ONNX Runtime does not broadcast this axis
        mask = op.Expand(valid, op.Concat([1, 1], new, [1], axis=0))  # [B, 1, N, T]
        return Positions(cos, sin, position_ids=position_ids, write_indices=write_indices, mask=mask)
