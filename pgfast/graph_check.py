"""What a graph may be, checked in its file before ONNX Runtime sees it.

ONNX Runtime would read weights from wherever a graph says, and it runs what a graph holds: loops, other providers' binaries.
An exporter's graph has a few dozen operators and weights in the bundle's own files; nothing else is let through. The file is
read here by hand, as far as that takes: the onnx package is not there at run time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pgfast.errors import BundleError

OPERATORS = {
    "": {
        "Add", "ArgMax", "Attention", "Cast", "CastLike", "Concat", "Constant", "Conv", "ConvTranspose", "DequantizeLinear",
        "Div", "Expand", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "Greater", "LayerNormalization", "Less",
        "LogSoftmax", "MatMul", "Max", "Mul", "Neg", "QuantizeLinear", "RMSNormalization", "Range", "ReduceMax", "ReduceMin",
        "Relu", "Reshape", "RotaryEmbedding", "Shape", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Tanh", "TensorScatter",
        "Transpose", "Unsqueeze", "Where",
    },
    "com.microsoft": {
        "GatherBlockQuantized", "GroupQueryAttention", "MatMulIntegerToFloat", "MatMulNBits",
        "SkipSimplifiedLayerNormalization",
    },
}  # fmt: skip
"""By domain: all that `pgfast export` writes."""
MAY_LACK_INPUTS = {"Attention", "GroupQueryAttention", "RotaryEmbedding", "MatMulNBits", "GatherBlockQuantized"}
"""Where an input in front of others may be left out (an empty name)."""
MOST_BYTES = 64 * 2**20
"""A graph without its weights has less than one."""
_NUMBER = re.compile(r"[0-9]{1,15}")
# fields of onnx.proto
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_INPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_REFUSED = 5, (6, 10, 11, 22, 23)  # graph, tensors, graphs, sparse tensors
_TENSOR_EXTERNAL, _ENTRY_KEY, _ENTRY_VALUE = 13, 1, 2


def check_graph(path: Path, sizes: Mapping[str, int]) -> None:
    """Make sure that a graph consists of an exporter's operators and takes its weights from the bundle's files only.

    Args:
        path: The ONNX file.
        sizes: Bytes of the bundle's files, by name.

    Raises:
        BundleError: It does not, or it is damaged; the message names the file.
    """
    if path.suffix != ".onnx" or path.stat().st_size > MOST_BYTES:
        raise BundleError(f"{path.name} is not a graph: its name ends in .onnx, and weights are in a file of their own")
    try:
        check_bytes(path.read_bytes(), sizes)
    except ValueError as error:
        raise BundleError(f"{path.name} is not a graph that pgfast exports: {error}") from error


def check_bytes(model: bytes, sizes: Mapping[str, int]) -> None:
    """Do what `check_graph` does with the content of a file; what is wrong is a `ValueError`."""
    graphs = 0
    for field, value in _fields(model):
        if field in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise ValueError("it holds functions or training steps")
        if field == _MODEL_GRAPH:
            graphs += 1
            _check_nodes(value, sizes)
    if graphs != 1:
        raise ValueError("it is damaged")


def _check_nodes(graph: bytes, sizes: Mapping[str, int]) -> None:
    for field, value in _fields(graph):
        if field == _GRAPH_SPARSE:
            raise ValueError("it holds sparse weights")
        if field == _GRAPH_INITIALIZER:
            _check_tensor(value, sizes)
        elif field == _GRAPH_NODE:
            _check_node(value, sizes)


def _check_node(node: bytes, sizes: Mapping[str, int]) -> None:
    operator = domain = ""
    lacks = False
    for field, value in _fields(node):
        if field == _NODE_OPERATOR:
            operator = _text(value)
        elif field == _NODE_DOMAIN:
            domain = _text(value)
        elif field == _NODE_INPUT:
            lacks |= not value
        elif field == _NODE_ATTRIBUTE:
            for part, content in _fields(value):
                if part in _ATTRIBUTE_REFUSED:
                    raise ValueError("it holds a graph within a graph")
                if part == _ATTRIBUTE_TENSOR:
                    _check_tensor(content, sizes)
    if operator not in OPERATORS.get(domain, ()):
        raise ValueError(f"it holds the operator {f'{domain}.{operator}'.lstrip('.')[:60]!r}")
    if lacks and operator not in MAY_LACK_INPUTS:
        raise ValueError(f"an input of {operator} is missing")


def _check_tensor(tensor: bytes, sizes: Mapping[str, int]) -> None:
    place: dict[str, str] = {}
    for field, value in _fields(tensor):
        if field == _TENSOR_EXTERNAL:
            entry = list(_fields(value))
            pair = {number: _text(text) for number, text in entry}
            if len(entry) != 2 or set(pair) != {_ENTRY_KEY, _ENTRY_VALUE} or pair[_ENTRY_KEY] in place:
                raise ValueError("the place of weights is damaged")
            place[pair[_ENTRY_KEY]] = pair[_ENTRY_VALUE]
    if not place:
        return
    location, numbers = place.get("location", ""), (place.get("offset", "0"), place.get("length", "0"))
    if location not in sizes:  # those are plain names of files in the folder
        raise ValueError(f"its weights are in {location[:80]!r}, which is not a file of the bundle")
    if set(place) - {"location", "offset", "length"} or not all(_NUMBER.fullmatch(number) for number in numbers):
        raise ValueError("the place of weights is damaged")
    if sum(map(int, numbers)) > sizes[location]:
        raise ValueError(f"its weights reach beyond the end of {location}")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the numbers and contents of a message's fields; numbers themselves have none."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        if key >> 32:  # other readers would cut it off, and see another field
            raise ValueError("it is damaged")
        if kind == 2:
            length, at = _varint(message, at)
            if at + length > end:
                raise ValueError("it is damaged")
            yield key >> 3, message[at : at + length]
            at += length
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("it is damaged")
    if at != end:
        raise ValueError("it is damaged")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a number of the wire format and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("it is damaged")


def _text(value: bytes) -> str:
    return value.decode()  # UnicodeDecodeError is a ValueError
