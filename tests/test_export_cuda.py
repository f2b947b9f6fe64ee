"""What CUDA sees of a bundle: operators with fast kernels, nothing for the host, no library beyond cuBLAS."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from conftest import Shape, make_checkpoint
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions

from pgfast.bundle import Bundle
from pgfast.errors import BundleError

# what onnxruntime-gpu 1.31.1 assigned to its CUDA provider in these graphs, and ran without cuDNN
DECODER_STEP = {
    "Gather",
    "GatherBlockQuantized",
    "Mul",
    "RMSNormalization",
    "SkipSimplifiedLayerNormalization",
    "MatMul",
    "MatMulNBits",
    "GroupQueryAttention",
    "Gelu",
    "Reshape",
    "Gemm",
    "Cast",
    "Tanh",
    "LogSoftmax",
    "ArgMax",
    "GatherElements",
    "Constant",
    "CastLike",  # of constants, folded when the graph is loaded
}
SHAPE_ONLY = {"Shape", "Squeeze", "Where", "Greater"}
DECODER = DECODER_STEP | SHAPE_ONLY | {"Concat", "GatherND", "Sub"}
VISION_ENCODER = {
    "Cast",
    "Reshape",
    "Transpose",
    "MatMul",
    "Add",
    "LayerNormalization",
    "Split",
    "Attention",
    "Gelu",
    "Constant",
}


@pytest.fixture(scope="module", params=["fp16", "bf16", "int8", "int4", "fp16 paligemma2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("cuda")
    precision, *gemma2 = request.param.split()
    checkpoint = make_checkpoint(folder / "checkpoint", Shape(hidden=64, intermediate=96, gemma2=bool(gemma2)))
    export(str(checkpoint), folder / "bundle", ExportOptions(precision, "cuda"))
    return Bundle.open(folder / "bundle")


def nodes(bundle: Bundle, graph: str) -> list[onnx.NodeProto]:
    model = onnx.load(bundle.path(bundle.manifest.graphs[graph].file), load_external_data=False)
    assert not model.functions
    return list(model.graph.node)


@pytest.mark.parametrize(
    ("graph", "allowed"), [("decoder_step", DECODER_STEP), ("decoder", DECODER), ("vision_encoder", VISION_ENCODER)]
)
def test_every_operator_has_a_kernel_on_cuda_that_needs_no_cudnn(graph: str, allowed: set[str], bundle: Bundle) -> None:
    assert {node.op_type for node in nodes(bundle, graph)} <= allowed


def test_a_step_leaves_nothing_to_the_host(bundle: Bundle) -> None:
    """No shape is asked for; the attention's total length, which lives on the host, is a constant."""
    step = nodes(bundle, "decoder_step")
    constants = {node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in step if node.op_type == "Constant"}
    model = onnx.load(bundle.path("decoder_step.onnx"), load_external_data=False)
    constants |= {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if not t.external_data}
    attention = [node for node in step if node.op_type == "GroupQueryAttention"]
    assert {int(constants[node.input[6]]) for node in attention} == {bundle.manifest.cache_length}
    assert {a.i for node in attention for a in node.attribute if a.name == "causal"} == {1}
    # every layer reads the place that the step itself has moved on, so that the output may lie on the input
    assert {node.input[5] for node in attention} == {"next_index"}
    assert [node.op_type for node in step if "last_index" in node.input] == ["Gather"]
    prompt = [node for node in nodes(bundle, "decoder") if node.op_type == "GroupQueryAttention"]
    assert {a.i for node in prompt for a in node.attribute if a.name == "causal"} == {0}


def test_a_step_has_at_most_225_kernels_at_full_size(bundle: Bundle) -> None:
    """12 a layer at 18 layers: attention is three, what is left out is no kernel."""
    if bundle.manifest.family == "paligemma2":
        pytest.skip("four norms a layer")
    step, layers = nodes(bundle, "decoder_step"), bundle.manifest.dimensions.num_hidden_layers
    kernels = sum({"GroupQueryAttention": 3, "Constant": 0, "Reshape": 0}.get(node.op_type, 1) for node in step)
    per_layer = 12
    assert kernels - per_layer * layers + per_layer * 18 <= 225


def test_fp32_is_in_the_dialect_that_cuda_has_kernels_for(tmp_path: Path, checkpoint: Path) -> None:
    manifest = export(str(checkpoint), tmp_path / "out", ExportOptions("fp32", "cuda"))
    assert manifest.dialect == "standard"
    assert set(manifest.graphs) == {"vision_encoder", "decoder"}


def test_a_manifest_whose_third_graph_differs_is_refused(bundle: Bundle) -> None:
    from pgfast.manifest import Manifest

    text = bundle.manifest.to_json()
    for right, wrong in (('"last_index": "int32[B]"', '"last_index": "int64[B]"'), ('"decoder_step": {', '"decoder_steps": {')):
        assert text.count(right) == 1
        with pytest.raises(BundleError, match=r"decoder_step\.onnx's last_index|graphs must be"):
            Manifest.from_json(text.replace(right, wrong))
