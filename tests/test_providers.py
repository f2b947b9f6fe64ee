"""Providers: the order, the options, and the words for what is missing; no hardware needed."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pgfast
from pgfast.bundle import Bundle
from pgfast.errors import ProviderError
from pgfast.runtime import providers
from pgfast.runtime.decoder import Decoder
from pgfast.runtime.providers import Target

DEMO_PICTURE = Path(pgfast.__file__).parent / "demo" / "blue_circle.png"


def test_auto_prefers_the_fastest_that_can_read_the_dialect() -> None:
    assert providers.candidates("auto", "standard") == ["tensorrt", "tensorrt-rtx", "cuda", "cpu"]
    assert providers.candidates("auto", "ort") == ["cuda", "cpu"]


def test_auto_falls_back_and_says_where_it_runs(bundle: Path) -> None:
    assert pgfast.load(bundle).provider == "cpu"


def test_an_unknown_provider_lists_the_known_ones() -> None:
    with pytest.raises(ProviderError, match=r"'tpu': choose one of auto, cpu, cuda, tensorrt, tensorrt-rtx"):
        pgfast.load(provider="tpu")


@pytest.mark.parametrize("name", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_an_explicit_provider_that_cannot_run_names_the_missing_piece(name: str, bundle: Path) -> None:
    if Bundle.open(bundle).manifest.dialect == "ort" and name != "cuda":
        with pytest.raises(ProviderError, match="export it with --target tensorrt"):
            pgfast.load(bundle, provider=name)
        return
    with pytest.raises(ProviderError, match=r"pip install 'pgfast\[|NVIDIA driver"):
        pgfast.load(bundle, provider=name)


class FakeOrt(types.SimpleNamespace):
    """An onnxruntime that claims to have every provider."""

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        self.preloaded = True


@pytest.mark.parametrize(
    ("name", "missing", "advice"),
    [
        ("cuda", "libcuda.so.1", "install the NVIDIA driver"),
        ("cuda", "libcublas.so.13", r"pip install 'pgfast\[gpu\]'"),
        ("tensorrt", "libnvinfer.so.10", r"pip install 'pgfast\[tensorrt\]'"),
    ],
)
def test_a_missing_library_is_named(name: str, missing: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = FakeOrt()
    monkeypatch.setattr(providers, "import_onnxruntime", lambda: ort)
    monkeypatch.setattr(providers, "first_missing", lambda names: missing if missing in names else None)
    with pytest.raises(ProviderError, match=f"{missing}.*{advice}"):
        providers.check_available(name)
    assert ort.preloaded
    monkeypatch.setattr(providers, "first_missing", lambda names: None)
    providers.check_available(name)


def test_first_missing_asks_the_loader() -> None:
    assert providers.first_missing(("libc.so.6", "libnot-there.so.9", "libneither.so")) == "libnot-there.so.9"
    assert providers.first_missing(("libc.so.6",)) is None


def test_libraries_that_pip_installed_are_loaded_from_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tensorrt_libs"
    package.mkdir()
    (package / "__init__.py").touch()
    subprocess.run(
        ["gcc", "-shared", "-o", str(package / "libnvinfer.so.10"), "-x", "c", "-"],
        input=b"int pgfast_test(void) { return 42; }",
        check=True,
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = providers.library_folder("tensorrt_libs")
    assert folder == package
    assert providers.load_libraries(folder, ("libnvinfer.so.10", "libnvonnxparser.so.10")) == [
        str(package / "libnvinfer.so.10")
    ]
    assert "tensorrt_libs" not in sys.modules
    (package / "libnvonnxparser.so.10").write_bytes(b"not a library")
    assert len(providers.load_libraries(folder, ("libnvinfer.so.10", "libnvonnxparser.so.10"))) == 1


def test_options_of_every_provider() -> None:
    shapes = {"input_ids": (1, 16), "image_features": (1, 256, 2048)}
    profile = "input_ids:1x16,image_features:1x256x2048"
    tensorrt = Target("tensorrt", 1, fp16=True, cache_dir=Path("/cache")).ort_providers(shapes, "decoder_1x16")
    assert [name for name, _ in tensorrt] == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    options = tensorrt[0][1]
    assert options["trt_fp16_enable"] == "1"
    assert options["device_id"] == "1"
    assert options["trt_engine_cache_path"] == "/cache"
    assert options["trt_engine_cache_prefix"] == "decoder_1x16"
    assert {options[f"trt_profile_{kind}_shapes"] for kind in ("min", "opt", "max")} == {profile}
    assert (options["trt_fp16_enable"], options["trt_bf16_enable"]) == ("1", "0")
    assert "trt_load_user_initializer" not in options
    assert Target("tensorrt").ort_providers(shapes, "", large=True)[0][1]["trt_load_user_initializer"] == "1"
    assert Target("tensorrt", fp16=False).tensorrt_options(shapes, "")["trt_fp16_enable"] == "0"
    assert Target("tensorrt", bf16=True).tensorrt_options(shapes, "")["trt_bf16_enable"] == "1"
    cuda = Target("cuda", 2).ort_providers()
    assert cuda[0] == (
        "CUDAExecutionProvider",
        {"device_id": "2", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"},
    )
    # with it every run must name its graph, so it is off unless the runtime does
    assert Target("cuda", cuda_graph=True).cuda_options() == Target("cuda").cuda_options() | {"enable_cuda_graph": "1"}
    assert Target("cpu").ort_providers() == [("CPUExecutionProvider", {})]
    rtx = Target("tensorrt-rtx", cache_dir=Path("/cache")).ort_providers(shapes)
    assert rtx[0][1]["nv_profile_opt_shapes"] == profile


def test_engines_of_different_bundles_are_kept_apart(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime names an engine after the graph alone: two fine-tunes of one model would share it."""
    from conftest import Shape, make_bundle, make_checkpoint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [make_bundle(make_checkpoint(tmp_path / f"c{i}", Shape(seed=i)), tmp_path / f"b{i}") for i in range(2)]
    caches = {pgfast.load(folder)._target.cache_dir for folder in folders}
    assert len(caches) == 2
    assert all(cache.parent == tmp_path / "pgfast" for cache in caches)


def test_auto_goes_on_when_a_session_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is there, its libraries load, and the session fails all the same (out of memory, say)."""
    from pgfast.runtime import model, session

    def fails_on_cuda(path: Path, spec: Any, target: Target, **rest: Any) -> Any:
        if target.name == "cuda":
            raise session.failure("it does not load", target, RuntimeError("CUDA failure 2: out of memory"))
        return real(path, spec, target, **rest)

    real = model.open_session
    monkeypatch.setattr(model, "open_session", fails_on_cuda)
    monkeypatch.setattr("pgfast.loading.check_available", lambda name: None)
    monkeypatch.setattr(
        "pgfast.loading.candidates", lambda provider, dialect: [provider] if provider != "auto" else ["cuda", "cpu"]
    )
    assert pgfast.load(bundle).provider == "cpu"
    with pytest.raises(ProviderError, match="out of memory"):
        pgfast.load(bundle, provider="cuda")


def test_fixed_shapes_get_a_session_each_and_padded_prompts(bundle: Path) -> None:
    """TensorRT's way of running, on the CPU: one session per shape, prompts padded to a multiple of 16."""
    from conftest import Fixed, open_model, random_pixels

    opened, model = open_model(bundle)
    asked: list[Any] = []

    def session_for(shapes: Any) -> Any:
        asked.append(shapes)
        return model._session("decoder", None)

    decoder = Decoder(opened.manifest, Fixed("cpu"), session_for)
    features = model.encode(random_pixels(0, opened.manifest.image.size))
    decoder.prompt(features, [[2, 5, 6, 7, 4]])
    model.decoder.prompt(features, [[2, 5, 6, 7, 4]])
    assert abs(decoder.logits(0) - model.decoder.logits(0)).max() < 1e-4
    assert list(asked[0]["input_ids"]) == [1, 16]
    assert list(asked[0]["past_key_values.0.key"]) == [1, 2, opened.manifest.cache_length, 16]
    decoder.step(1)
    decoder.step(1)
    assert list(asked[1]["input_ids"]) == [1, 1]
    assert list(asked[1]["image_features"]) == [1, 0, 48]
    assert len(asked) == 2  # the second step reuses the first one's binding


def test_fixed_shapes_of_steps_are_powers_of_two(bundle: Path) -> None:
    """Three rows run as four; the fourth slot is free and stays free."""
    from conftest import Fixed, open_model, random_pixels

    opened, model = open_model(bundle)
    asked: list[Any] = []

    def session_for(shapes: Any) -> Any:
        asked.append(shapes)
        return model._session("decoder", None)

    decoder = Decoder(opened.manifest, Fixed("cpu"), session_for, slots=4)
    features = np.repeat(model.encode(random_pixels(0, opened.manifest.image.size)), 3, axis=0)
    prompts = [[2, 5, 6, 7, 4], [2, 9, 4], [2, 8, 8, 4]]
    decoder.prompt(features, prompts)
    model.decoder.prompt(features, prompts)
    for _ in range(3):
        found, wanted = decoder.step(3), model.decoder.step(3)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)
    assert list(asked[1]["input_ids"]) == [4, 1]
    assert list(asked[1]["past_key_values.0.key"]) == [4, 2, opened.manifest.cache_length, 16]
    assert decoder.length(3) == 0


def test_onnxruntime_does_not_report_to_its_makers(tmp_path: Path) -> None:
    # before it sends anything it leaves an identifier in the user's cache folder
    code = f"import pgfast; pgfast.load(provider='cpu').answer({str(DEMO_PICTURE)!r}, 'what color is it?')"
    # nothing else of the environment: in the usual CI services it is quiet anyway
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert not list(tmp_path.rglob("*"))
