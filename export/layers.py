"""The layers both towers share, as onnxscript modules. Weights are stored as the graphs use them: plain matrices as [in, out].

Shapes: B batch, N new positions, D hidden size, I intermediate size.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from .storage import Kind, Storage

OPSET = 24
IR_VERSION = 11
ORT_DOMAIN = "com.microsoft"
PLAIN = Storage()
Op = Any
"""onnxscript's OpBuilder: its operators are attributes made on demand."""


class Dialect(enum.StrEnum):
    """Which operators the graphs are written in."""

    STANDARD = "standard"
    """ONNX opset 24 alone: TensorRT takes it whole, any runtime can read it."""
    ORT = "ort"
    """ONNX Runtime's fused operators, for its CPU and CUDA providers."""


class Linear(nn.Module):
    """`x @ weight + bias`, with the weight stored as `storage` says."""

    def __init__(
        self, size_in: int, size_out: int, dtype: ir.DataType, *, bias: bool = False, storage: Storage = PLAIN
    ) -> None:
        super().__init__()
        self.storage, self._dtype, self._size = storage, dtype, (size_in, size_out)
        blocks = size_in // storage.block
        if storage.kind is Kind.NBITS:
            blob = storage.block * storage.bits // 8
            self.weight = nn.Parameter([size_out, blocks, blob], ir.DataType.UINT8)
            self.weight_scale = nn.Parameter([size_out, blocks], dtype)
        elif storage.kind is Kind.DYNAMIC:
            self.weight = nn.Parameter([size_in, size_out], ir.DataType.INT8)
            self.weight_scale = nn.Parameter([size_out], dtype)
        elif storage.kind is Kind.DEQUANTIZE:
            self.weight = nn.Parameter([size_in, size_out], ir.DataType.INT4 if storage.bits == 4 else ir.DataType.INT8)
            self.weight_scale = nn.Parameter([blocks, size_out], dtype)
        else:
            self.weight = nn.Parameter([size_in, size_out], dtype)
        self.bias = nn.Parameter([size_out], dtype) if bias else None

    def forward(self, op: Op, x: ir.Value | QuantizedRows, *, row_scale: bool = True) -> ir.Value:
        """[..., in] to [..., out].

        Args:
            op: The builder.
            x: The input, or what `prepare` made of it.
            row_scale: False leaves the scales of quantized rows to the caller, who may apply them later (no bias then).
        """
        kind = self.storage.kind
        if kind is Kind.DYNAMIC:
            rows = x if isinstance(x, QuantizedRows) else quantize_rows_in_graph(op, x)
            # the kernel applies one scale per output; of the left side it takes only a single one
            one = op.Constant(value=ir.tensor(np.array(1, dtype=np.float32)))
            y = op.MatMulIntegerToFloat(rows.values, self.weight, one, self.weight_scale, rows.zero_point, _domain=ORT_DOMAIN)
            y = op.Mul(y, rows.scale) if row_scale else y
        elif kind is Kind.NBITS:
            assert isinstance(x, ir.Value)
            y = matmul_nbits(op, x, self.weight, self.weight_scale, self._size, self.storage)
        elif kind is Kind.DEQUANTIZE:
            y = op.MatMul(x, op.DequantizeLinear(self.weight, self.weight_scale, axis=0, block_size=self.storage.block))
        else:
            y = op.MatMul(x, self.weight)
        return op.Add(y, self.bias) if self.bias is not None else y

    def prepare(self, op: Op, x: ir.Value) -> ir.Value | QuantizedRows:
        """Make what several layers of one input can share: its quantized rows, where the storage needs them."""
        return quantize_rows_in_graph(op, x) if self.storage.kind is Kind.DYNAMIC else x


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations as uint8 with one scale per row."""

    values: ir.Value
    """uint8 [..., K]"""
    scale: ir.Value
    """[..., 1]"""
    zero_point: ir.Value
    """uint8 scalar, 128"""


def quantize_rows_in_graph(op: Op, x: ir.Value, factor: ir.Value | None = None) -> QuantizedRows:
    """Quantize each row by its largest value.

    Unsigned with zero point 128, because ONNX Runtime's CPU kernels are fast for uint8 x int8 only. Few passes over x, and
    none that writes floats but one: on a prompt these passes are what a faster product leaves over.

    Args:
        op: The builder.
        x: [..., K].
        factor: [..., 1] by which every row of x is still to be multiplied: only its scale needs to know.
    """
    largest = op.Max(op.ReduceMax(x, [-1], keepdims=1), op.Neg(op.ReduceMin(x, [-1], keepdims=1)), 1e-12)
    scale = op.Mul(largest, 1 / 127)
    one = op.Constant(value=ir.tensor(np.array(1, dtype=np.float32)))
    zero_point = op.Constant(value=ir.tensor(np.array(128, dtype=np.uint8)))
    values = op.QuantizeLinear(op.Div(x, scale), one, zero_point)
    return QuantizedRows(values, scale if factor is None else op.Mul(scale, factor), zero_point)


def matmul_nbits(op: Op, x: ir.Value, weight: ir.Value, scale: ir.Value, size: tuple[int, int], storage: Storage) -> ir.Value:
    """MatMulNBits with 8-bit activations on the CPU (accuracy_level 4: the other levels are several times slower)."""
    size_in, size_out = size
    return op.MatMulNBits(
        x,
        weight,
        scale,
        K=size_in,
        N=size_out,
        bits=storage.bits,
        block_size=storage.block,
        accuracy_level=4,
        _domain=ORT_DOMAIN,
    )


class VocabularyTable(nn.Module):
    """The token embedding, the vocabulary head, or (tied) both; quantized, it is still stored once.

    GatherBlockQuantized wants rows flat where MatMulNBits wants them in blocks: tied, that is two initializers over the same
    bytes, and `weight_rows` is the one without bytes of its own.
    """

    def __init__(
        self, vocab_size: int, width: int, dtype: ir.DataType, storage: Storage, *, embeds: bool, projects: bool
    ) -> None:
        super().__init__()
        self.storage, self._size = storage, (width, vocab_size)
        self.weight_rows = None
        if storage.kind is not Kind.NBITS:
            self.weight = nn.Parameter([vocab_size, width], dtype)
            return
        blocks, blob = width // storage.block, storage.block * storage.bits // 8
        flat, blocked = [vocab_size, blocks * blob], [vocab_size, blocks, blob]
        self.weight = nn.Parameter(blocked if projects else flat, ir.DataType.UINT8)
        self.weight_scale = nn.Parameter([vocab_size, blocks], dtype)
        if embeds and projects:
            self.weight_rows = nn.Parameter(flat, ir.DataType.UINT8)

    def forward(self, op: Op, ids: ir.Value | None, hidden: Any = None) -> ir.Value:
        """Embed ids [B, S] to [B, S, D], or (ids None) turn hidden [B, D] into logits [B, V]."""
        if ids is not None:
            if self.storage.kind is not Kind.NBITS:
                return op.Gather(self.weight, ids)
            rows = self.weight if self.weight_rows is None else self.weight_rows
            return op.GatherBlockQuantized(
                *(rows, ids, self.weight_scale),
                bits=self.storage.bits,
                block_size=self.storage.block,
                gather_axis=0,
                quantize_axis=1,
                _domain=ORT_DOMAIN,
            )
        if self.storage.kind is not Kind.NBITS:
            return op.Gemm(hidden, self.weight, transB=1)
        return matmul_nbits(op, hidden, self.weight, self.weight_scale, self._size, self.storage)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in fp32."""

    def __init__(self, size: int, eps: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self.bias = nn.Parameter([size], dtype)
        self._eps = eps

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[..., D] to [..., D]."""
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self._eps, stash_type=1)


class RMSNorm(nn.Module):
    """Gemma's RMSNorm: fp32 inside, `x * rsqrt(mean(x^2) + eps) * (1 + w)`, cast last (GemmaRMSNorm.forward).

    `weight` holds 1 + w, added in fp32 at export.
    """

    def __init__(self, size: int, eps: float, dtype: ir.DataType, dialect: Dialect) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self._eps, self._dialect = eps, dialect

    def forward(self, op: Op, x: ir.Value, residual: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """Normalise x, or x + residual.

        Args:
            op: The builder.
            x: [B, N, D].
            residual: [B, N, D], added first.

        Returns:
            (normalised, the sum before normalisation), [B, N, D] each.
        """
        if residual is None:
            return self._norm(op, x), x
        if self._dialect is Dialect.ORT:
            normed, _, _, total = op.SkipSimplifiedLayerNormalization(
                x, residual, self.weight, epsilon=self._eps, _domain=ORT_DOMAIN, _outputs=4
            )
            return normed, total
        total = op.Add(x, residual)
        return self._norm(op, total), total

    def _norm(self, op: Op, x: ir.Value) -> ir.Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self._eps, stash_type=1)


def gelu_tanh(op: Op, x: ir.Value, dtype: ir.DataType, dialect: Dialect) -> ir.Value:
    """GELU's tanh form; in fp32 for TensorRT, which writes it out and would cube x in fp16 (beyond 40 that overflows)."""
    if dialect is not Dialect.STANDARD or dtype is ir.DataType.FLOAT:
        return op.Gelu(x, approximate="tanh")
    wide = op.Gelu(op.Cast(x, to=ir.DataType.FLOAT.value), approximate="tanh")
    return op.Cast(wide, to=dtype.value)


class GatedMLP(nn.Module):
    """Gemma's feed-forward: `down(gelu_tanh(gate(x)) * up(x))`."""

    def __init__(self, size: int, inner: int, dtype: ir.DataType, dialect: Dialect, storage: Storage = PLAIN) -> None:
        super().__init__()
        self._dtype, self._dialect = dtype, dialect
        self.gate = Linear(size, inner, dtype, storage=storage)
        self.up = Linear(size, inner, dtype, storage=storage)
        self.down = Linear(inner, size, dtype, storage=storage)

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[B, N, D] to [B, N, D]."""
        shared = self.gate.prepare(op, x)
        gate = gelu_tanh(op, self.gate(op, shared), self._dtype, self._dialect)
        if isinstance(shared, QuantizedRows):  # a row's scale passes through its quantization: one pass less over [B, N, I]
            inner = op.Mul(gate, self.up(op, shared, row_scale=False))
            return self.down(op, quantize_rows_in_graph(op, inner, factor=shared.scale))
        return self.down(op, op.Mul(gate, self.up(op, shared)))
