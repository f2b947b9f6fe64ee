"""How a matrix is stored in a graph: plain, or quantized in one of the layouts the targets have fast kernels for.

Matrices come as torch stores them, [N, K] (N outputs, K inputs), in runs of rows, so that memory stays bounded.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .tensors import Array


class Kind(enum.StrEnum):
    """Layouts."""

    PLAIN = "plain"
    """MatMul with [K, N] in the compute type."""
    DYNAMIC = "dynamic"
    """int8 [K, N] with a scale per output; activations become uint8 with a scale per row while running (CPU)."""
    NBITS = "nbits"
    """MatMulNBits: uint8 [N, K / block, block * bits / 8] with a scale per block (CPU and CUDA)."""
    DEQUANTIZE = "dequantize"
    """int4 or int8 [K, N] behind a blocked DequantizeLinear (TensorRT)."""


@dataclass(frozen=True, slots=True)
class Storage:
    """One layout with its parameters."""

    kind: Kind = Kind.PLAIN
    bits: int = 8
    block: int = 32
    """Weights that share a scale, along K."""

    def encode(self, pieces: Iterable[Array]) -> tuple[Iterator[Array], list[Array]]:
        """Quantize a matrix.

        Args:
            pieces: float32 runs of rows, [n, K].

        Returns:
            (pieces of the stored weight along its first axis, list that holds the scales once they are exhausted).
        """
        scales: list[Array] = []
        return (self._nbits if self.kind is Kind.NBITS else self._transposed)(pieces, scales), scales

    def join_scales(self, scales: list[Array]) -> Array:
        """Put the scales of all pieces in the layout of the graph, float32."""
        joined = np.concatenate(scales, axis=0)  # [N] or [N, K / block]
        return np.ascontiguousarray(joined.T) if self.kind is Kind.DEQUANTIZE else joined

    def _nbits(self, pieces: Iterable[Array], scales: list[Array]) -> Iterator[Array]:
        for piece in pieces:
            q, scale = quantize_blocks(piece, self.bits, self.block)  # [n, blocks, block]
            scales.append(scale)
            unsigned = (q.astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8)
            yield unsigned if self.bits == 8 else unsigned[..., ::2] | unsigned[..., 1::2] << 4

    def _transposed(self, pieces: Iterable[Array], scales: list[Array]) -> Iterator[Array]:
        columns = []
        for piece in pieces:
            if self.kind is Kind.DYNAMIC:
                q, scale = quantize_rows(piece)  # [n, K], [n]
            else:
                blocks, scale = quantize_blocks(piece, self.bits, self.block)
                q = blocks.reshape(len(piece), -1)
            scales.append(scale)
            columns.append(np.ascontiguousarray(q.T))  # [K, n]
        whole = np.concatenate(columns, axis=1)  # [K, N]
        if self.bits == 4:  # two per byte along the last axis, low half first, as ONNX packs int4
            nibbles = whole.view(np.uint8) & 0xF
            whole = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        yield whole


PAIR_SAFE = 64
"""Largest weight whose products with bytes, two added, fit 16 bits: 2 * 255 * 64 < 2**15. x86 without VNNI adds pairs that way
and saturates; ONNX Runtime has an exact kernel, as fast, but its session loads in 16 to 18 s instead of 5 to 6 (3B, AVX2)."""


def quantize_rows(matrix: Array) -> tuple[Array, Array]:
    """Symmetric int8 within `PAIR_SAFE` with a scale per row: [n, K] to (int8 [n, K], float32 [n])."""
    scale = np.maximum(np.abs(matrix).max(axis=1), 1e-12) / np.float32(PAIR_SAFE)
    return np.rint(matrix / scale[:, None]).astype(np.int8), scale.astype(np.float32)


RATIOS = (8 / 7, 1.0, 0.92, 0.84)
"""Multiples of a block's largest weight tried as the lower end of the 4-bit range; 8 / 7 is the symmetric range."""


def quantize_blocks(matrix: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Symmetric blocks along K: [n, K] to (int8 [n, K / block, block], float32 [n, K / block]).

    With 4 bits the range has one more step below zero than above, so a block's largest weight is put at that end (the
    scale may be negative). The symmetric range and smaller ones are tried too, each with the scale that fits best in the
    least-squares sense, and the one with the smallest squared error is kept.

    Raises:
        ValueError: K is not a multiple of the block.
    """
    n, k = matrix.shape
    if k % block:
        raise ValueError(f"{k} inputs do not divide into blocks of {block}")
    x = matrix.reshape(n, k // block, block)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=2)[..., None], axis=2)  # signed, [n, blocks, 1]
    if bits == 8:
        scale = np.maximum(np.abs(largest), 1e-12) / np.float32(127)
        return np.rint(x / scale).astype(np.int8), scale[..., 0]
    q, scale, error = _fit(x, largest, RATIOS[0], bits)
    for ratio in RATIOS[1:]:
        other_q, other_scale, other_error = _fit(x, largest, ratio, bits)
        better = other_error < error
        q, scale = np.where(better, other_q, q), np.where(better, other_scale, scale)
        error = np.minimum(error, other_error)
    return q.astype(np.int8), scale[..., 0].astype(np.float32)


def _fit(x: Array, largest: Array, ratio: float, bits: int) -> tuple[Array, Array, Array]:
    """Quantize with `ratio * largest` at the lower end; returns (q, best scale for that q, squared error)."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale = largest * np.float32(ratio / low)
    scale = np.where(np.abs(scale) < 1e-12, np.float32(1e-12), scale)
    q = np.clip(np.rint(x / scale), low, high)
    square = (q * q).sum(axis=2, keepdims=True)
    scale = np.where(square > 0, (x * q).sum(axis=2, keepdims=True) / np.maximum(square, 1), scale)
    return q, scale, ((x - q * scale) ** 2).sum(axis=2, keepdims=True)
