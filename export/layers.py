"""The layers both towers share, as onnxscript modules. Weights are stored as the graphs use them: matrices as [in, out].

Shapes: B batch, N new positions, D hidden size, I intermediate size.
"""

from __future__ import annotations

import enum
from typing import Any

import onnx_ir as ir
from onnxscript import nn

OPSET = 24
IR_VERSION = 11
ORT_DOMAIN = "com.microsoft"
Op = Any
"""onnxscript's OpBuilder: its operators are attributes made on demand."""


class Dialect(enum.StrEnum):
    """Which operators the graphs are written in."""

    STANDARD = "standard"
    """ONNX opset 24 alone: TensorRT takes it whole, any runtime can read it."""
    ORT = "ort"
    """ONNX Runtime's fused operators, for its CPU and CUDA providers."""


class Linear(nn.Module):
    """`x @ weight + bias`; weight [in, out]."""

    def __init__(self, size_in: int, size_out: int, dtype: ir.DataType, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter([size_in, size_out], dtype)
        self.bias = nn.Parameter([size_out], dtype) if bias else None

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[..., in] to [..., out]."""
        y = op.MatMul(x, self.weight)
        return op.Add(y, self.bias) if self.bias is not None else y


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


class GatedMLP(nn.Module):
    """Gemma's feed-forward: `down(gelu_tanh(gate(x)) * up(x))`."""

    def __init__(self, size: int, inner: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.gate = Linear(size, inner, dtype)
        self.up = Linear(size, inner, dtype)
        self.down = Linear(inner, size, dtype)

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[B, N, D] to [B, N, D]."""
        return self.down(op, op.Mul(op.Gelu(self.gate(op, x), approximate="tanh"), self.up(op, x)))
