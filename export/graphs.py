"""The graphs of a bundle: their inputs, outputs and symbolic dimensions are declared here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from pgfast.manifest import GraphSpec

from .config import PaliGemmaConfig
from .gemma import Decoder
from .gemma_step import DecoderStep
from .layers import IR_VERSION, OPSET, ORT_DOMAIN, PLAIN, Dialect, Linear, VocabularyTable
from .siglip import VisionEncoder
from .storage import Storage

VISION_ENCODER, DECODER, DECODER_STEP, MASK_DECODER = "vision_encoder", "decoder", "decoder_step", "mask_decoder"


Dims = Sequence[int | str]
"""Sizes, and names of the sizes that are open."""


def new_value(name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
    """An input or output with its type."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def new_graph(name: str, inputs: list[ir.Value]) -> ir.Graph:
    """An empty graph with its inputs."""
    return ir.Graph(inputs, [], nodes=[], name=name, opset_imports={"": OPSET})


def finish_graph(graph: ir.Graph, outputs: dict[str, tuple[ir.Value, ir.DataType, Dims]]) -> ir.Model:
    """Name the outputs and make a model of the graph."""
    for name, (value, dtype, shape) in outputs.items():
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        graph.outputs.append(value)
    for node in graph:  # the builder notes class and scope of every node, three quarters of a small graph's file
        node.metadata_props.clear()
    if any(node.domain == ORT_DOMAIN for node in graph):
        graph.opset_imports[ORT_DOMAIN] = 1
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="pgfast")


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph whose initializers have no values yet."""

    model: ir.Model
    storages: dict[str, Storage]
    """How each matrix is stored, by the name of its initializer."""

    def is_alias(self, value: ir.Value) -> bool:
        """Whether an initializer has no bytes of its own: the flat view of a quantized table."""
        name = str(value.name)
        return name.endswith("_rows") and name.removesuffix("_rows") in self.storages

    def parameters(self) -> list[ir.Value]:
        """Initializers that come from the weight table; the builder's own constants already have their value."""
        return [value for value in self.model.graph.initializers.values() if value.const_value is None]


def _storages(module: nn.Module) -> dict[str, Storage]:
    return {str(m.weight.name): m.storage for m in module.modules() if isinstance(m, Linear | VocabularyTable)}


def build_vision_encoder(
    config: PaliGemmaConfig,
    dtype: ir.DataType,
    features_dtype: ir.DataType,
    dialect: Dialect,
    storage: Storage = PLAIN,
) -> Graph:
    """`pixel_values` float32 [B, 3, R, R] to `image_features` [B, P, D]; plain operators in both dialects."""
    vision = config.vision
    size = vision.image_size
    pixel_values = new_value("pixel_values", ir.DataType.FLOAT, ["B", vision.num_channels, size, size])
    graph = new_graph(VISION_ENCODER, [pixel_values])
    module = VisionEncoder(config, dtype, features_dtype, dialect, storage)
    features = module(GraphBuilder(graph).op, pixel_values)
    shape: Dims = ["B", vision.num_image_tokens, config.text.hidden_size]
    return Graph(finish_graph(graph, {"image_features": (features, features_dtype, shape)}), _storages(module))


def build_decoder(
    config: PaliGemmaConfig,
    dtype: ir.DataType,
    dialect: Dialect,
    cache_length: int,
    storage: Storage = PLAIN,
    table_storage: Storage = PLAIN,
) -> Graph:
    """Prompt and decoding in one graph (`Decoder.forward` says what goes in and out).

    TensorRT's cache update wants a fixed number of slots, so the standard dialect has `cache_length` of them; the ort dialect
    leaves T open.
    """
    text = config.text
    int64 = ir.DataType.INT64
    cache_shape = _cache_shape(config, cache_length if dialect is Dialect.STANDARD else "T")
    input_ids = new_value("input_ids", int64, ["B", "S"])
    image_features = new_value("image_features", features_type(dtype), ["B", "P", text.hidden_size])
    write_indices = new_value("write_indices", int64, ["B"])
    kv_lengths = new_value("kv_lengths", int64, ["B"])
    past = _past(text.num_hidden_layers, dtype, cache_shape)
    inputs = [input_ids, image_features, write_indices, kv_lengths, *(value for pair in past for value in pair)]
    graph = new_graph(DECODER, inputs)
    module = Decoder(text, dtype, dialect, storage, table_storage)
    logits, token, logprob, present = module(GraphBuilder(graph).op, input_ids, image_features, write_indices, kv_lengths, past)
    outputs = _decoder_outputs(config, dtype, cache_shape, logits, token, logprob, present)
    return Graph(finish_graph(graph, outputs), _storages(module))


def build_decoder_step(
    config: PaliGemmaConfig, dtype: ir.DataType, cache_length: int, storage: Storage = PLAIN, table_storage: Storage = PLAIN
) -> Graph:
    """One new token per row, for CUDA graphs (`DecoderStep.forward` says what goes in and out); the decoder's initializers."""
    text = config.text
    cache_shape = _cache_shape(config, cache_length)
    input_ids = new_value("input_ids", ir.DataType.INT64, ["B", 1])
    last_index = new_value("last_index", ir.DataType.INT32, ["B"])
    past = _past(text.num_hidden_layers, dtype, cache_shape)
    graph = new_graph(DECODER_STEP, [input_ids, last_index, *(value for pair in past for value in pair)])
    module = DecoderStep(text, dtype, Dialect.ORT, storage, table_storage)
    op = GraphBuilder(graph).op
    logits, token, logprob, index, present = module(op, input_ids, last_index, past, cache_length)
    outputs = _decoder_outputs(config, dtype, cache_shape, logits, token, logprob, present)
    outputs["next_index"] = (index, ir.DataType.INT32, ["B"])
    return Graph(finish_graph(graph, outputs), _storages(module))


def _cache_shape(config: PaliGemmaConfig, slots: int | str) -> Dims:
    return ["B", config.text.num_key_value_heads, slots, config.text.head_dim]


def _past(layers: int, dtype: ir.DataType, shape: Dims) -> list[tuple[ir.Value, ir.Value]]:
    def cache(layer: int, part: str) -> ir.Value:
        return new_value(f"past_key_values.{layer}.{part}", dtype, shape)

    return [(cache(layer, "key"), cache(layer, "value")) for layer in range(layers)]


def _decoder_outputs(
    config: PaliGemmaConfig,
    dtype: ir.DataType,
    cache_shape: Dims,
    logits: ir.Value,
    token: ir.Value,
    logprob: ir.Value,
    present: list[tuple[ir.Value, ir.Value]],
) -> dict[str, tuple[ir.Value, ir.DataType, Dims]]:
    outputs: dict[str, tuple[ir.Value, ir.DataType, Dims]] = {
        "logits": (logits, ir.DataType.FLOAT, ["B", config.text.vocab_size]),
        "next_token": (token, ir.DataType.INT64, ["B", 1]),
        "next_token_logprob": (logprob, ir.DataType.FLOAT, ["B", 1]),
    }
    for i, (key, value) in enumerate(present):
        outputs[f"present.{i}.key"] = (key, dtype, cache_shape)
        outputs[f"present.{i}.value"] = (value, dtype, cache_shape)
    return outputs


def features_type(dtype: ir.DataType) -> ir.DataType:
    """Type of `image_features` beside a decoder of this type: numpy has no bfloat16, so those cross as float32."""
    return ir.DataType.FLOAT if dtype is ir.DataType.BFLOAT16 else dtype


def graph_spec(graph: Graph, file: str) -> GraphSpec:
    """Describe a graph for the manifest."""
    model = graph.model
    inputs = {str(value.name): describe(value) for value in model.graph.inputs}
    return GraphSpec(file, inputs, {str(value.name): describe(value) for value in model.graph.outputs})


def describe(value: ir.Value) -> str:
    """Type and shape as text, for example `float16[B, 256, 2048]`."""
    assert value.dtype is not None
    assert value.shape is not None
    dims = ", ".join(str(dim.value) if isinstance(dim, ir.SymbolicDim) else str(dim) for dim in value.shape)
    return f"{value.dtype.numpy().name}[{dims}]"
