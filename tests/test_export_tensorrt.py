"""Every standard graph through TensorRT's own parser and builder, which need no GPU (wheel `tensorrt-rtx`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt
from conftest import Shape, make_bundle, make_checkpoint

from pgfast.bundle import Bundle
from pgfast.manifest import Manifest

Profile = dict[str, tuple[int, ...]]


@pytest.fixture(
    scope="module",
    params=["paligemma-fp16", "paligemma-fp32", "paligemma2-fp16", "paligemma-bf16", "paligemma-int8", "paligemma2-int4"],
)
def standard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Head sizes that TensorRT has fused kernels for (16 to 256, multiples of 8)."""
    folder = tmp_path_factory.mktemp("tensorrt")
    family, precision = request.param.split("-")
    tied = request.param == "paligemma-fp16"
    shape = Shape(heads=8, kv_heads=1, head_dim=64, hidden=64, intermediate=96, tied=tied, gemma2=family == "paligemma2")
    checkpoint = make_checkpoint(folder / "checkpoint", shape)
    return Bundle.open(make_bundle(checkpoint, folder / "bundle", precision=precision, dialect="standard"))


def build(path: Path, profiles: list[Profile], *, decomposable: bool) -> Any:
    """Parse and build for Ada (8.9); returns (engine, names of layer types)."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    if decomposable:  # there is no fused attention in fp32
        for layer in layers:
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer  # how TensorRT's Python API casts down
                layer.attention.decomposable = True
                assert layer.attention.decomposable
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config), {layer.type.name for layer in layers}


def decoder_profile(m: Manifest, image_tokens: int, text_tokens: int) -> Profile:
    d = m.dimensions
    shapes: Profile = {
        "input_ids": (1, text_tokens),
        "image_features": (1, image_tokens, d.hidden_size),
        "write_indices": (1,),
        "kv_lengths": (1,),
    }
    for layer in range(d.num_hidden_layers):
        for part in ("key", "value"):
            shapes[f"past_key_values.{layer}.{part}"] = (1, d.num_key_value_heads, m.cache_length, d.head_dim)
    return shapes


def test_the_vision_encoder_builds(standard: Bundle) -> None:
    m = standard.manifest
    profile: Profile = {"pixel_values": (1, 3, m.image.size, m.image.size)}
    engine, layers = build(standard.path("vision_encoder.onnx"), [profile], decomposable=m.precision == "fp32")
    assert engine is not None
    assert "ATTENTION_INPUT" in layers


def test_the_decoder_builds_with_a_profile_for_the_prompt_and_one_for_decoding(standard: Bundle) -> None:
    m = standard.manifest
    profiles = [decoder_profile(m, m.dimensions.num_image_tokens, 16), decoder_profile(m, 0, 1)]
    engine, layers = build(standard.path("decoder.onnx"), profiles, decomposable=m.precision == "fp32")
    assert engine is not None
    # taken whole: cache update, rotary embedding and (where no cap is between) attention are TensorRT's own layers
    assert {"KV_CACHE_UPDATE", "ROTARY_EMBEDDING"} <= layers
    assert ("ATTENTION_INPUT" in layers) == (m.family == "paligemma")


def test_standard_graphs_use_no_custom_operator(standard: Bundle) -> None:
    import onnx

    for name in ("vision_encoder.onnx", "decoder.onnx"):
        model = onnx.load(standard.path(name), load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
        onnx.checker.check_model(str(standard.path(name)), full_check=True)


@pytest.mark.slow
def test_a_full_size_int4_decoder_builds(tmp_path: Path) -> None:
    """PaliGemma-3B-224's shape with random weights; about five minutes, 8 GB of disk."""
    from pgfast.bench.synth import synthesize
    from pgfast.export.build import export
    from pgfast.export.plan import ExportOptions

    synthesize("3b-224", tmp_path / "checkpoint")
    export(str(tmp_path / "checkpoint"), tmp_path / "bundle", ExportOptions("int4", "tensorrt"))
    bundle = Bundle.open(tmp_path / "bundle")
    m = bundle.manifest
    profiles = [decoder_profile(m, m.dimensions.num_image_tokens, 16), decoder_profile(m, 0, 1)]
    engine, layers = build(bundle.path("decoder.onnx"), profiles, decomposable=False)
    assert engine is not None
    assert {"KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "ATTENTION_INPUT"} <= layers
    # int4 layers (1.98 billion weights and their scales) and the table in fp16
    assert 2.0e9 < engine.nbytes < 2.6e9
