"""An ONNX file: refused, or one whose weights lie in the bundle's files for protobuf's reader, too.

The check reads protobuf by hand; the onnx package, which reads it as ONNX Runtime does, must not see another file than it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

if __name__ == "__main__":
    import atheris  # noqa: F401 - `instrumented` looks for it

import onnx
from google.protobuf.message import DecodeError

from fuzz.target import fuzz, instrumented, one_line

with instrumented():
    from pgfast.graph_check import MAY_LACK_INPUTS, OPERATORS, check_bytes

SIZES = {"decoder.onnx.data": 5000, "a": 10}


@cache
def small_graph() -> bytes:
    """A graph with each of the things that are looked at."""
    helper = onnx.helper
    weights = onnx.TensorProto(name="w", data_type=1, dims=[2, 2], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "decoder.onnx.data"), ("offset", "64"), ("length", "16")):
        weights.external_data.add(key=key, value=value)
    constant = onnx.TensorProto(data_type=7, dims=[1], int64_data=[4])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("RotaryEmbedding", ["y", "", "w"], ["r"], num_heads=1),
        helper.make_node("MatMulNBits", ["r", "w", "w"], ["z"], domain="com.microsoft", K=2, N=2),
    ]
    values = [helper.make_tensor_value_info(name, 1, ["B", 2]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weights])
    return bytes(helper.make_model(graph).SerializeToString())


def tensors(message: Any) -> Iterator[Any]:
    """All tensors anywhere in a message."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                if isinstance(each, onnx.TensorProto):
                    yield each
                yield from tensors(each)


def check(data: bytes) -> None:
    """Read a graph."""
    try:
        check_bytes(data, SIZES)
    except ValueError as error:
        one_line(error)
        return
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return  # ONNX Runtime refuses it, too
    assert not model.functions
    assert not model.training_info
    for node in model.graph.node:
        assert node.op_type in OPERATORS[node.domain]
        assert all(node.input) or node.op_type in MAY_LACK_INPUTS
        assert not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    for tensor in tensors(model):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place or tensor.data_location == onnx.TensorProto.EXTERNAL:
            assert int(place.get("offset", 0)) + int(place.get("length", 0)) <= SIZES[place["location"]]


if __name__ == "__main__":
    fuzz(check)
