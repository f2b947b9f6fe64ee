"""Quantized weights: the layouts against a numpy reference, the graphs against transformers with the same rounded weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Shape, make_checkpoint, open_model, random_pixels
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions
from pgfast.export.storage import Kind, Storage, quantize_blocks, quantize_rows
from pgfast.export.tensors import canonical_name
from pgfast.export.verify import TransformersReference, relative_error
from safetensors.numpy import load_file, save_file

from pgfast.errors import ExportError

PROMPT = [2, 7, 5, 12, 9, 4]


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([4, 8]), st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_blocks_are_never_worse_than_round_to_nearest(n: int, blocks: int, bits: int, seed: int, magnitude: float) -> None:
    x = (np.random.default_rng(seed).standard_normal((n, 32 * blocks)) * magnitude).astype(np.float32)
    q, scale = quantize_blocks(x, bits, 32)
    assert q.min() >= -(1 << (bits - 1))
    assert q.max() < 1 << (bits - 1)
    back = (q * scale[..., None]).reshape(x.shape)
    plain = np.abs(x).reshape(n, blocks, 32).max(axis=2, keepdims=True) / ((1 << (bits - 1)) - 1)
    nearest = np.clip(np.rint(x.reshape(n, blocks, 32) / plain), -(1 << (bits - 1)), (1 << (bits - 1)) - 1) * plain
    ours, theirs = ((back - x) ** 2).sum(), ((nearest.reshape(x.shape) - x) ** 2).sum()
    assert ours <= theirs * (1 + 1e-5)


def test_the_search_beats_round_to_nearest_clearly() -> None:
    x = np.random.default_rng(0).standard_normal((200, 512)).astype(np.float32)
    q, scale = quantize_blocks(x, 4, 32)
    ours = ((q * scale[..., None]).reshape(x.shape) - x).std()
    plain = np.abs(x).reshape(200, 16, 32).max(axis=2, keepdims=True) / 7
    nearest = (np.clip(np.rint(x.reshape(200, 16, 32) / plain), -8, 7) * plain).reshape(x.shape)
    assert ours < 0.9 * (nearest - x).std()


def test_zero_weights_stay_zero() -> None:
    zeros = np.zeros((3, 64), np.float32)
    for bits in (4, 8):
        q, scale = quantize_blocks(zeros, bits, 32)
        assert not (q * scale[..., None]).any()
    q, scale = quantize_rows(zeros)
    assert not (q * scale[:, None]).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_pieces_give_the_same_bytes_as_the_whole(bits: int) -> None:
    x = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    for kind in (Kind.NBITS, Kind.DEQUANTIZE, Kind.DYNAMIC):
        storage = Storage(kind, bits, 32)
        whole, scales = storage.encode([x])
        first = np.concatenate([piece.reshape(-1) for piece in whole]), storage.join_scales(scales)
        parts, scales = storage.encode([x[:7], x[7:20], x[20:]])
        second = np.concatenate([piece.reshape(-1) for piece in parts]), storage.join_scales(scales)
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Read the matrices back out of a graph, as float32 [out, in], by the layouts' definitions in the operators' docs."""
    model = onnx.load(path)
    initializers: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
    block = next((a.i for node in model.graph.node for a in node.attribute if a.name == "block_size"), 0)
    matrices = {}
    for name, tensor in initializers.items():
        if f"{name}_scale" not in initializers:
            continue
        q = numpy_helper.to_array(tensor)
        scale = numpy_helper.to_array(initializers[f"{name}_scale"]).astype(np.float32)
        if tensor.data_type == onnx.TensorProto.UINT8:  # MatMulNBits: blocks along the inputs, zero point in the middle
            bits = q.size * 8 // (scale.size * block)
            values = q if bits == 8 else np.stack([q & 15, q >> 4], axis=-1)
            values = values.reshape(len(q), scale.shape[1], block).astype(np.float32) - (1 << (bits - 1))
            matrices[name] = (values * scale[..., None]).reshape(len(q), -1)
        elif scale.ndim == 1:  # a scale per output
            matrices[name] = (q.astype(np.float32) * scale).T
        else:  # blocked DequantizeLinear along the inputs
            matrices[name] = (q.astype(np.float32) * np.repeat(scale, q.shape[0] // scale.shape[0], axis=0)).T
    return matrices


SOURCES = {
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj", "self_attn.out_proj"],
    "fc1": ["mlp.fc1"],
    "fc2": ["mlp.fc2"],
    "mlp.gate": ["mlp.gate_proj"],
    "mlp.up": ["mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}


def rounded_checkpoint(checkpoint: Path, bundle: Path, out: Path) -> Path:
    """The checkpoint with every quantized matrix replaced by what the bundle holds of it."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    stored_name = {canonical_name(name): name for name in tensors}
    for graph, root in (("vision_encoder", "vision_tower.encoder"), ("decoder", "language_model")):
        for name, matrix in dequantized(bundle / f"{graph}.onnx").items():
            words = name.split(".")
            if words[0] == "layers":
                wanted = [f"{root}.layers.{words[1]}.{source}.weight" for source in SOURCES[".".join(words[2:-1])]]
            else:
                wanted = ["lm_head.weight"] if words[0] == "lm_head" else [f"{root}.{words[0]}.weight"]
            at = 0
            for target in (stored_name[name] for name in wanted if name in stored_name):
                rows = len(tensors[target])
                tensors[target] = np.ascontiguousarray(matrix[at : at + rows])
                at += rows
            assert at == len(matrix), name
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


# what is left of the error once the weights are the same: activations in 8 bits
CASES = [("cpu", "int8", None, 0.05), ("cpu", "int4", None, 0.05), ("cpu", "int4", 64, 0.05)]
CASES += [("cuda", "int8", None, 0.05), ("cuda", "int4", None, 0.05), ("cuda", "int8", 64, 0.05)]
# (ONNX Runtime fuses DequantizeLinear and MatMul into a kernel with 8-bit activations, too)
CASES += [("tensorrt", "int8", None, 0.02), ("tensorrt", "int4", None, 0.02), ("tensorrt", "int4", 64, 0.02)]


@pytest.mark.parametrize(("target", "precision", "block", "tolerance"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_graph_computes_what_its_rounded_weights_say(
    target: str, precision: str, block: int | None, tolerance: float, tied: bool, tmp_path: Path
) -> None:
    shape = Shape(hidden=64, intermediate=192, vision_hidden=64, head_dim=32, tied=tied, gemma2=not tied)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    bundle = tmp_path / "bundle"
    export(str(checkpoint), bundle, ExportOptions(precision, target, block_size=block))
    reference = TransformersReference(rounded_checkpoint(checkpoint, bundle, tmp_path / "rounded"))
    unrounded = TransformersReference(checkpoint)
    _, model = open_model(bundle)
    pixels = random_pixels(0, 32)
    model.decoder.prompt(model.encode(pixels), [PROMPT])
    generated: list[int] = []
    for token in (11, 12, 13):
        wanted = reference.logits(pixels, PROMPT, generated)
        error = relative_error(model.decoder.logits(0), wanted)
        assert error < tolerance
        # the rounding itself is larger: the reference really has the bundle's weights
        assert precision == "int8" or relative_error(unrounded.logits(pixels, PROMPT, generated), wanted) > 2 * error
        generated.append(token)
        model.decoder.step(1, np.array([token]))


def test_the_tied_table_is_stored_once(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape(hidden=64, intermediate=96, vision_hidden=64))
    export(str(checkpoint), tmp_path / "out", ExportOptions("int4", "cpu"))
    model = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.name.startswith("embed_tokens")
    }
    assert places["embed_tokens.weight"] == places["embed_tokens.weight_rows"]
    assert set(places) == {"embed_tokens.weight", "embed_tokens.weight_rows", "embed_tokens.weight_scale"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("bf16", "cpu"), "bf16 does not fit target cpu"),
        (ExportOptions("int8", "cuda", "int8"), "vision precision int8 does not fit target cuda"),
        (ExportOptions("fp32", "cpu", "int4"), "vision precision int4 does not fit target cpu"),
        (ExportOptions("fp12", "cpu"), "choose one of fp32, fp16, int8, int4"),
        (ExportOptions("fp32", "tpu"), "unknown target 'tpu'"),
        (ExportOptions("fp32", "cpu", block_size=64), "fp32 has no blocks"),
        (ExportOptions("int4", "cpu", block_size=64), "hidden_size 48 does not divide into blocks of 64"),
    ],
)
def test_combinations_that_do_not_exist_say_which_do(
    checkpoint: Path, tmp_path: Path, options: ExportOptions, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(str(checkpoint), tmp_path / "out", options)


def test_a_width_that_does_not_divide_into_blocks_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape(hidden=36, heads=2, kv_heads=1))
    with pytest.raises(ExportError, match="hidden_size 36 does not divide"):
        export(str(checkpoint), tmp_path / "out", ExportOptions("int4", "cpu"))


def test_bf16_graphs_are_whole_and_cannot_be_verified_here(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in ("cuda", "tensorrt"):
        manifest = export(str(checkpoint), tmp_path / target, ExportOptions("bf16", target))
        assert manifest.cache_type == "bfloat16"
        assert manifest.graphs["vision_encoder"].outputs["image_features"].startswith("float32")
        model = onnx.load(tmp_path / target / "decoder.onnx")
        table = next(tensor for tensor in model.graph.initializer if tensor.name == "embed_tokens.weight")
        wanted = load_file(checkpoint / "model.safetensors")["language_model.model.embed_tokens.weight"]
        assert table.data_type == onnx.TensorProto.BFLOAT16
        assert relative_error(numpy_helper.to_array(table).astype(np.float32), wanted) < 4e-3
    monkeypatch.setattr("pgfast.export.build._write_files", None)  # refused before anything is written
    with pytest.raises(ExportError, match="no bfloat16 kernels"):
        export(str(checkpoint), tmp_path / "verified", ExportOptions("bf16", "cuda", verify=True))


@pytest.mark.parametrize(
    ("precision", "target"), [("int8", "tensorrt"), ("int4", "tensorrt"), ("int8", "cuda"), ("int4", "cuda")]
)
def test_weights_that_dequantize_beyond_fp16_are_refused(precision: str, target: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape(hidden=64, intermediate=96))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["language_model.model.layers.0.mlp.gate_proj.weight"][0, 0] = 1e5
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.gate\.weight holds values beyond fp16"):
        export(str(checkpoint), tmp_path / "out", ExportOptions(precision, target))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_blocks_without_the_runtimes_fusion_give_the_same(precision: str, tmp_path: Path) -> None:
    """DequantizeLinear itself: with its optimizations ONNX Runtime replaces it by a kernel of another rounding."""
    import onnxruntime

    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape(hidden=64, intermediate=96, head_dim=32))
    export(str(checkpoint), tmp_path / "out", ExportOptions(precision, "tensorrt"))
    reference = TransformersReference(rounded_checkpoint(checkpoint, tmp_path / "out", tmp_path / "rounded"))
    opened, model = open_model(tmp_path / "out")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = str(opened.path("decoder.onnx"))
    model._sessions["decoder", None] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pixels = random_pixels(0, 32)
    model.decoder.prompt(model.encode(pixels), [PROMPT])
    assert relative_error(model.decoder.logits(0), reference.logits(pixels, PROMPT)) < 5e-3


@pytest.mark.parametrize(("precision", "vision"), [("fp32", "int8"), ("fp32", "fp16"), ("int8", "fp32")])
def test_mixed_precisions_verify_by_the_coarser_part(precision: str, vision: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape(hidden=64, intermediate=96, vision_hidden=64))
    manifest = export(str(checkpoint), tmp_path / "out", ExportOptions(precision, "cpu", vision, verify=True))
    assert manifest.parity is not None
    assert manifest.parity["threshold"] == (0.1 if "int8" in (precision, vision) else 1e-2)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_progress_ends_at_the_total(precision: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape(hidden=64, intermediate=96, vision_hidden=64))
    calls: list[tuple[int, int]] = []
    export(str(checkpoint), tmp_path / "out", ExportOptions(precision), lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_the_largest_products_do_not_saturate() -> None:
    """x86 without VNNI adds two products of bytes in 16 bits."""
    q, scale = quantize_rows(np.array([[1.0], [-1.0]], dtype=np.float32).repeat(64, axis=1))  # [N, K], as large as they get
    constants = {"b": q.T.copy(), "one": np.array(1, np.float32), "b_scale": scale, "zero": np.array(128, np.uint8)}
    nodes = [helper.make_node("MatMulIntegerToFloat", ["a", *constants], ["y"], domain="com.microsoft")]
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, ["R", 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "product", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"a": np.full((3, 64), 255, dtype=np.uint8)})
    np.testing.assert_allclose(y, np.broadcast_to([127.0 * 64, -127.0 * 64], (3, 2)), rtol=1e-6)


def test_the_manifest_says_the_precision_of_each_part(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape(hidden=64, intermediate=96, vision_hidden=64))
    export(str(checkpoint), tmp_path / "out", ExportOptions("int4", "cpu"))
    raw = json.loads((tmp_path / "out" / "pgfast.json").read_text())
    assert (raw["precision"], raw["vision_precision"]) == ("int4", "int8")
