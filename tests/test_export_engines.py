"""TensorRT-RTX engines: built without a GPU, recorded in the manifest, rebuilt when stale."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt
from conftest import Shape, make_bundle, make_checkpoint
from pgfast.export import tensorrt_engines as engines
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions

import pgfast.engine
from pgfast.bundle import Bundle, sha256_of
from pgfast.cli import main
from pgfast.errors import BundleError, ExportError, MissingDependencyError
from pgfast.manifest import MANIFEST, Manifest
from pgfast.runtime.providers import engine_cache

VERSION = trt.__version__
FUSED = Shape(heads=8, kv_heads=1, head_dim=64, hidden=64)
"""A head size that TensorRT has fused attention for."""
FILES = ["decoder.sm89.engine", "vision_encoder.sm89.engine"]


def export_rtx(checkpoint: Path, out: Path, *capabilities: str, precision: str = "fp16") -> Manifest:
    return export(str(checkpoint), out, ExportOptions(precision, "tensorrt-rtx", compute_capabilities=capabilities))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fused") / "checkpoint", FUSED)


@pytest.fixture(scope="module")
def exported(fused: Path) -> Path:
    """A bundle with engines for Ada; never changed."""
    export_rtx(fused, fused.parent / "bundle", "8.9")
    return fused.parent / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return shutil.copytree(exported, tmp_path / "bundle")


def tamper(bundle: Path, **fields: Any) -> None:
    """Change what the manifest says of the decoder's engine."""
    raw = json.loads((bundle / MANIFEST).read_text())
    (entry,) = (entry for entry in raw["engines"] if entry["file"] == FILES[0])
    entry |= fields
    (bundle / MANIFEST).write_text(json.dumps(raw))


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(list(args))
    assert isinstance(exit.value.code, int)
    return exit.value.code


@pytest.fixture
def no_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("long work was begun")

    monkeypatch.setattr("pgfast.export.build.make_plan", fail)
    monkeypatch.setattr(engines, "build_engine", fail)


def test_engines_are_files_of_the_bundle_like_all_others(exported: Path) -> None:
    opened = Bundle.open(exported, full_check=True)
    m = opened.manifest
    assert (m.target, m.dialect) == ("tensorrt-rtx", "standard")
    assert [engine.file for engine in m.engines] == FILES
    for engine in m.engines:
        assert (engine.compute_capability, engine.builder, engine.max_batch) == ("8.9", VERSION, 4)
        assert engine.built_from == m.graph_digest(engine.graph)
        assert m.files[engine.file].sha256 == sha256_of(exported / engine.file)
        assert m.files[engine.file].size == (exported / engine.file).stat().st_size > m.files[f"{engine.graph}.onnx"].size
    assert engines.stale_engines(opened) == {}
    assert {path.name for path in exported.iterdir()} == {*m.files, MANIFEST}
    assert pgfast.load(exported, provider="cpu").provider == "cpu"  # the graphs are the standard ones


def test_fp32_attention_is_taken_apart_and_several_gpus_have_an_engine_each(fused: Path, tmp_path: Path) -> None:
    m = export_rtx(fused, tmp_path / "bundle", "8.6", "12.0", "8.6", precision="fp32")
    assert [engine.file for engine in m.engines] == [
        f"{graph}.sm{number}.engine" for graph in ("decoder", "vision_encoder") for number in (120, 86)
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_fp32_attention_is_marked(precision: str, fused: Path, tmp_path: Path) -> None:
    path = make_bundle(fused, tmp_path / "bundle", precision=precision, dialect="standard") / "decoder.onnx"
    builder = trt.Builder(engines._listener())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, engines._listener())
    assert parser.parse_from_file(str(path))
    engines._split_fp32_attention(network)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    attention = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    assert len(attention) == FUSED.layers
    for layer in attention:
        layer.__class__ = trt.IAttentionInputLayer
        assert layer.attention.decomposable == (precision == "fp32")


def test_the_decoder_has_a_profile_for_the_prompt_and_one_for_decoding(exported: Path) -> None:
    m = Bundle.open(exported).manifest
    p, most, hidden = m.dimensions.num_image_tokens, m.limits.prompt_tokens, m.dimensions.hidden_size
    prompt, decode = engines.profiles_of(m, "decoder", 4)
    assert prompt["input_ids"] == [(1, 1), (1, 16), (4, most)]
    assert prompt["image_features"] == [(1, p, hidden), (1, p, hidden), (4, p, hidden)]
    assert decode["input_ids"] == [(1, 1), (1, 1), (4, 1)]
    assert decode["image_features"] == [(1, 0, hidden), (1, 0, hidden), (4, 0, hidden)]
    assert prompt["past_key_values.1.value"][2] == (4, 1, m.cache_length, 64)
    assert set(prompt) == set(decode) == set(m.graphs["decoder"].inputs)
    config = engines.configure(trt.Builder(engines._listener()), "8.9", [prompt, decode])
    assert config.num_optimization_profiles == 2
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
    assert engines.profiles_of(m, "vision_encoder", 1) == [{"pixel_values": [(1, 3, 32, 32)] * 3}]


def test_a_graph_that_is_refused_in_batches_is_built_for_one_row(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = engines.profiles_of

    def refused_in_batches(m: Manifest, graph: str, batch: int) -> Any:
        asked.append(batch)
        profiles = real(m, graph, batch)
        if batch > 1:  # the cache's slots are fixed: no builder takes this
            profiles[0]["past_key_values.0.key"] = [(1, 1, 3, 64)] * 3
        return profiles

    monkeypatch.setattr(engines, "profiles_of", refused_in_batches)
    entry, _ = engines.build_engine(Bundle.open(bundle).manifest, bundle, "decoder", "8.9", tmp_path)
    assert asked == [4, 1]
    assert entry.max_batch == 1


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"builder": "1.6.0"}, "was built by 1.6.0"), ({"built_from": "0" * 64}, "was built from another graph")],
)
def test_a_stale_engine_is_rebuilt(fields: dict[str, str], why: str, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = Bundle.open(bundle).manifest
    tamper(bundle, **fields)
    assert engines.stale_engines(Bundle.open(bundle)) == {FILES[0]: why}
    (built,) = engines.refresh_engines(bundle)
    assert caplog.messages == [f"engine {FILES[0]} {why}, rebuilding with {VERSION}"]
    after = Bundle.open(bundle, full_check=True)
    assert after.manifest.engines == before.engines
    assert built == before.engines[0]
    assert engines.stale_engines(after) == {}
    assert engines.refresh_engines(bundle) == []
    assert {path.name for path in bundle.iterdir()} == {*before.files, MANIFEST}


def test_the_bundle_opens_at_every_moment_of_a_refresh(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(bundle, builder="1.6.0")
    listed: list[list[str]] = []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        listed.append([engine.file for engine in Bundle.open(bundle, full_check=True).manifest.engines])

    monkeypatch.setattr(os, "replace", replace)
    engines.refresh_engines(bundle)
    assert listed == [FILES[1:], FILES[1:], FILES]


def test_the_command_says_what_is_there_rebuilds_and_adds(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("engines", str(bundle)) == 0
    assert capsys.readouterr().out.count("up to date") == 2
    tamper(bundle, builder="1.6.0")
    assert run("engines", str(bundle), "--compute-capability", "12.1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("built now")] == [
        "decoder.sm121.engine",
        FILES[0],
        "vision_encoder.sm121.engine",
    ]
    assert lines[-1] == f"vision_encoder.sm89.engine  TensorRT-RTX {VERSION}, up to date"
    assert run("inspect", str(bundle), "--check") == 0
    out = capsys.readouterr().out
    assert f"engine decoder for compute capability 12.1, batch 1 to 4, by TensorRT-RTX {VERSION}\n" in out
    tamper(bundle, built_from="0")
    assert run("inspect", str(bundle)) == 0
    assert "STALE: built from another graph" in capsys.readouterr().out


def test_engines_can_be_added_to_a_standard_bundle_but_not_to_another(
    fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    standard = make_bundle(fused, tmp_path / "standard", precision="fp16", dialect="standard")
    assert run("engines", str(standard)) == 0
    assert "no engines" in capsys.readouterr().out
    assert [engine.file for engine in engines.refresh_engines(standard, ["8.9"])] == FILES
    with pytest.raises(ExportError, match="export the checkpoint with --target tensorrt-rtx"):
        engines.refresh_engines(make_bundle(fused, tmp_path / "ort"))


@pytest.mark.usefixtures("no_builds")
def test_an_impossible_capability_is_refused_first(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--target", "tensorrt-rtx", "--compute-capability", "8.9", "--compute-capability", "9.0"]
    assert run("export", "nowhere", str(tmp_path / "out"), *args) == 2
    offered = "builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
    assert capsys.readouterr().err == f"pgfast: error: compute capability 9.0: TensorRT-RTX {VERSION} {offered}\n"
    with pytest.raises(ExportError, match=r"compute capability CURRENT.*builds for 7\.5"):
        engines.refresh_engines(bundle, ["CURRENT"])
    with pytest.raises(ExportError, match="target cuda has no engines to build: leave out --compute-capability"):
        export("nowhere", tmp_path / "out", ExportOptions(target="cuda", compute_capabilities=("8.9",)))
    assert engines.check_options("tensorrt-rtx", ()) == ("8.6", "8.9", "12.0")


@pytest.mark.usefixtures("no_builds")
def test_a_missing_builder_is_said_first(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    message = r"tensorrt_rtx is not installed: pip install 'pgfast\[tensorrt-rtx\]'"
    with pytest.raises(MissingDependencyError, match=message):
        export_rtx(Path("nowhere"), tmp_path / "out", "8.9")
    with pytest.raises(MissingDependencyError, match=message):
        engines.refresh_engines(bundle)


def test_what_the_builder_refuses_leaves_nothing_behind(fused: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "bundle"
    # Turing has no fp32 matrix products
    with pytest.raises(ExportError, match=r"TensorRT-RTX cannot build decoder.sm75.engine: .*FP32 GEMM is not supported"):
        export_rtx(fused, out, "7.5", precision="fp32")
    assert list(tmp_path.iterdir()) == []  # not even the folder made for it


def test_a_refresh_that_fails_leaves_the_bundle_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(bundle, builder="1.6.0")
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    monkeypatch.setattr(engines, "profiles_of", lambda *args: [])
    with pytest.raises(ExportError, match=r"cannot build decoder.sm89.engine: .*profile"):
        engines.refresh_engines(bundle)
    monkeypatch.undo()
    monkeypatch.setattr(engines.tempfile, "mkdtemp", lambda **rest: os.mkdir("/proc/none"))
    with pytest.raises(ExportError, match="cannot be written"):
        engines.refresh_engines(bundle)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_loading_warns_of_engines_of_another_graph(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pgfast.loading.check_available", lambda name: None)
    monkeypatch.setattr("pgfast.loading.Engine", lambda *args: None)  # there is no GPU to open a session on
    tamper(bundle, builder="1.6.0")  # says nothing about the graph, and the builder need not be here
    pgfast.load(bundle, provider="tensorrt-rtx")
    assert caplog.messages == []
    tamper(bundle, built_from="0" * 64)
    pgfast.load(bundle, provider="cpu")
    assert caplog.messages == []
    pgfast.load(bundle, provider="tensorrt-rtx")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"{FILES[0]}: built from another graph")


def test_the_manifest_is_read_without_engines_and_checked_with_them(exported: Path) -> None:
    m = Bundle.open(exported).manifest
    old = json.loads(m.to_json())
    del old["engines"]
    assert Manifest.from_json(json.dumps(old)) == dataclasses.replace(m, engines=[])
    decoder = m.engines[0]
    for entry, message in (
        (dataclasses.replace(decoder, file="tokenizer.json"), "'tokenizer.json' is not the name of an engine"),
        (dataclasses.replace(decoder, graph="other"), "is not the name of an engine"),
        (dataclasses.replace(decoder, compute_capability="89"), "is not the name of an engine"),
        (dataclasses.replace(decoder, builder="1.7\n\x1b[2J"), "'1.7.*' is not a version"),
        (
            dataclasses.replace(decoder, file="decoder.sm86.engine", compute_capability="8.6"),
            "files does not list decoder.sm86",
        ),
    ):
        with pytest.raises(BundleError, match=message):
            Manifest.from_json(dataclasses.replace(m, engines=[entry]).to_json())


def test_tensorrt_keeps_its_caches_beside_the_bundle(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = Bundle.open(bundle).manifest.digest()
    elsewhere = tmp_path / "cache" / "pgfast" / digest[:16]
    targets: list[Any] = []
    monkeypatch.setattr("pgfast.loading.check_available", lambda name: None)
    monkeypatch.setattr("pgfast.loading.Engine", lambda bundle, target, threads: targets.append(target))
    pgfast.load(bundle, provider="tensorrt")
    pgfast.load(bundle, provider="tensorrt-rtx")
    assert [target.cache_dir for target in targets] == [bundle / ".tensorrt" / digest[:16], elsewhere]
    options = targets[0].tensorrt_options({}, "")
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(bundle / ".tensorrt" / digest[:16])
    assert not (bundle / ".tensorrt").exists()  # until there is something to keep
    (bundle / ".tensorrt" / digest[:16]).mkdir(parents=True)
    (bundle / ".tensorrt" / digest[:16] / "decoder.engine").touch()
    Bundle.open(bundle, full_check=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert engine_cache("tensorrt", bundle, digest) == elsewhere
    shutil.rmtree(bundle / ".tensorrt")
    (bundle / ".tensorrt").symlink_to(tmp_path)
    assert engine_cache("tensorrt", bundle, digest) == elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_gpu_that_the_builder_knows(family: str, precision: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dataclasses.replace(FUSED, gemma2=family == "paligemma2"))
    offered = [name for name in engines.offered_capabilities() if precision == "fp16" or name != "7.5"]
    m = export_rtx(checkpoint, tmp_path / "bundle", *offered, precision=precision)
    assert len(m.engines) == 2 * len(offered)
    assert {engine.max_batch for engine in m.engines} == {4}
