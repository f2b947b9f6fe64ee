"""Which types and layouts a precision means on each target."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pgfast.errors import ExportError

from .config import TextConfig
from .layers import PLAIN, Dialect
from .storage import Kind, Storage

PRECISIONS = {
    "cpu": ("fp32", "fp16", "int8", "int4"),
    "cuda": ("fp32", "fp16", "bf16", "int8", "int4"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8", "int4"),
    "tensorrt-rtx": ("fp32", "fp16", "bf16", "int8", "int4"),
}
VISION_PRECISIONS = {
    "cpu": ("fp32", "fp16", "int8"),
    "cuda": ("fp32", "fp16", "bf16"),
    "tensorrt": ("fp32", "fp16", "bf16"),
    "tensorrt-rtx": ("fp32", "fp16", "bf16"),
}
FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_BITS = {"int8": 8, "int4": 4}


def dialect_of(precision: str, target: str) -> Dialect:
    """Return the operators to write; CUDA has no GroupQueryAttention in fp32 (it would run on the CPU, copies included)."""
    return Dialect.ORT if target == "cpu" or (target == "cuda" and precision != "fp32") else Dialect.STANDARD


@dataclass(frozen=True, slots=True)
class Precision:
    """Compute types, and how matrices are stored."""

    dtype: ir.DataType
    """Of the decoder's activations and cache."""
    storage: Storage
    """Of the decoder's matrices."""
    table_storage: Storage
    """Of embedding and vocabulary head."""
    vision: str
    """Precision of the vision encoder, resolved."""
    vision_dtype: ir.DataType
    vision_storage: Storage


def check_words(precision: str, vision_precision: str | None, target: str) -> str:
    """Refuse combinations that do not exist, before anything is read (raises as `choose`); returns the vision precision."""
    if target not in PRECISIONS:
        raise ExportError(f"unknown target {target!r}: choose one of {', '.join(PRECISIONS)}")
    default = ("int8" if target == "cpu" else "fp16") if precision in _BITS else precision
    vision = default if vision_precision is None else vision_precision
    for what, word, allowed in (("precision", precision, PRECISIONS), ("vision precision", vision, VISION_PRECISIONS)):
        if word not in allowed[target]:
            raise ExportError(f"{what} {word} does not fit target {target}: choose one of {', '.join(allowed[target])}")
    return vision


def choose(
    precision: str, vision_precision: str | None, target: str, text: TextConfig, block_size: int | None = None
) -> Precision:
    """Resolve the user's words.

    Args:
        precision: fp32, fp16, bf16, int8 or int4, of the decoder.
        vision_precision: Of the vision encoder; None: int8 beside a quantized decoder on the CPU, fp16 beside one elsewhere,
            else the decoder's.
        target: cpu, cuda or tensorrt.
        text: The decoder; the widths of its matrices must divide into blocks.
        block_size: Weights that share a scale; None: 32, or 16 where the widths ask for it.

    Raises:
        ExportError: The combination does not exist; the message lists what does.
    """
    vision = check_words(precision, vision_precision, target)
    quantized = precision in _BITS
    vision_dtype = ir.DataType.FLOAT if vision == "int8" else FLOATS[vision]
    vision_storage = Storage(Kind.DYNAMIC) if vision == "int8" else PLAIN
    if not quantized:
        if block_size is not None:
            raise ExportError(f"{precision} has no blocks: a block size goes with int8 or int4")
        return Precision(FLOATS[precision], PLAIN, PLAIN, vision, vision_dtype, vision_storage)
    bits = _BITS[precision]
    widths = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads x head_dim": text.num_attention_heads * text.head_dim,
    }
    if (precision, target) == ("int8", "cpu"):  # only the table is in blocks
        widths = {"hidden_size": text.hidden_size}
    block = block_size or (32 if all(width % 32 == 0 for width in widths.values()) else 16)
    for name, width in widths.items():
        if width % block:
            raise ExportError(f"{name} {width} does not divide into blocks of {block}: {precision} is not possible")
    blocks = Storage(Kind.NBITS, bits, block)
    if target == "cpu":
        # int8: a scale per output and per row of activations is twice as fast on prompts as blocks; the head sees one row
        storage = Storage(Kind.DYNAMIC) if precision == "int8" else blocks
        return Precision(ir.DataType.FLOAT, storage, blocks, vision, vision_dtype, vision_storage)
    if target == "cuda":
        return Precision(ir.DataType.FLOAT16, blocks, blocks, vision, vision_dtype, vision_storage)
    # TensorRT dequantizes what a Gather reads from as a whole: the table stays as it is
    return Precision(ir.DataType.FLOAT16, Storage(Kind.DEQUANTIZE, bits, block), PLAIN, vision, vision_dtype, vision_storage)
