"""The triton layout: its configuration, its model on a stand-in of the Python backend, its graphs in ONNX Runtime alone."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_triton
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from conftest import DEMO_CHECKPOINT, TESTS, make_bundle
from fake_triton import InferenceRequest, TritonError, parse_config, serve
from pgfast.export import triton
from pgfast.export.cli import export as export_command
from pgfast.export.plan import ExportOptions
from pgfast.export.triton import export_triton

import pgfast
from pgfast.bundle import Bundle
from pgfast.engine import Engine
from pgfast.errors import BundleError, ExportError
from pgfast.loading import demo_bundle

PICTURE = (TESTS.parent / "pgfast" / "demo" / "blue_circle.png").read_bytes()
COLOUR = "what color is the shape?"
MODELS = ("pgfast", "vision_encoder", "decoder")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    done = CliRunner().invoke(export_command, [str(DEMO_CHECKPOINT), str(out), "--layout", "triton"])
    assert done.exit_code == 0, done.output
    return out


def config_of(repository: Path, model: str) -> dict[str, Any]:
    return parse_config((repository / model / "config.pbtxt").read_text())


@pytest.fixture(scope="module")
def model(repository: Path) -> Iterator[Any]:
    """The repository's model.py, loaded as Triton loads it: the file alone, with the backend's module beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", fake_triton)
        spec = importlib.util.spec_from_file_location("model", repository / "pgfast" / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "model", module)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config_of(repository, "pgfast")),
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
                "model_repository": str(repository / "pgfast"),
                "model_version": "1",
                "model_name": "pgfast",
            }
        )
        yield model
        model.finalize()


def texts(*rows: list[Any]) -> np.ndarray:
    array = np.empty((len(rows), len(rows[0])), np.object_)
    for i, row in enumerate(rows):
        array[i] = row
    return array


def ask(question: str = COLOUR, picture: bytes = PICTURE, **more: Any) -> InferenceRequest:
    outputs, is_cancelled = more.pop("outputs", None), more.pop("is_cancelled", lambda: False)
    return InferenceRequest({"image": texts([picture]), "question": texts([question]), **more}, outputs, is_cancelled)


def answer(model: Any, repository: Path, *requests: InferenceRequest) -> list[Any]:
    return serve(model, config_of(repository, "pgfast"), list(requests))


def test_a_picture_and_a_question_become_an_answer(model: Any, repository: Path, demo: Engine) -> None:
    (found,) = answer(model, repository, ask())
    wanted = demo.answer(PICTURE, COLOUR)
    assert sorted(found) == ["confidence", "finish_reason", "text"]
    assert found["text"].tolist() == [[b"blue"]]
    assert found["finish_reason"].tolist() == [[b"stop"]]
    assert found["confidence"][0, 0] == pytest.approx(wanted.confidence, abs=1e-5)


def test_requests_of_one_call_are_answered_each_by_itself(model: Any, repository: Path) -> None:
    rows = InferenceRequest(
        {"image": texts([PICTURE], [PICTURE]), "question": texts([COLOUR], ["what shape is in the image?"])}
    )
    short = ask(max_new_tokens=np.array([[1]], np.int32), outputs=["finish_reason"])
    broken = ask(picture=b"no picture")
    empty = ask(question=" ")
    latin = InferenceRequest({"image": texts([PICTURE]), "question": texts([b"\xff"])})
    none = ask(max_new_tokens=np.array([[0]], np.int32))
    found = answer(model, repository, rows, short, broken, empty, latin, none, ask())
    assert found[0]["text"].tolist() == [[b"blue"], [b"circle"]]
    assert list(found[1]) == ["finish_reason"]
    assert found[-1]["text"].tolist() == [[b"blue"]]
    messages = {"not a picture": found[2], "question is empty": found[3], "UTF-8": found[4], "max_new_tokens is 0": found[5]}
    for message, error in messages.items():
        assert message in error.message()
        assert error.code() == TritonError.INVALID_ARG


def test_an_error_says_which_row_it_is_about(model: Any, repository: Path) -> None:
    request = InferenceRequest({"image": texts([PICTURE], [b"no picture"]), "question": texts([COLOUR], [COLOUR])})
    (error,) = answer(model, repository, request)
    assert error.message().startswith("row 1: ")


def test_choices_come_back_with_their_probabilities(model: Any, repository: Path, demo: Engine) -> None:
    choices = ["red", "blue", "green"]
    twice = ask(choices=texts(["red", "red"]))
    found = answer(model, repository, ask(choices=texts(choices)), ask(choices=texts(["yes", "no"])), ask(), twice)
    wanted = demo.answer(PICTURE, COLOUR, choices=choices)
    assert wanted.choices is not None
    assert found[0]["text"].tolist() == [[b"blue"]]
    assert found[0]["choice_probabilities"][0] == pytest.approx([wanted.choices[choice] for choice in choices], abs=1e-5)
    assert found[1]["choice_probabilities"].shape == (1, 2)
    assert "choice_probabilities" not in found[2]
    assert found[3].code() == TritonError.INVALID_ARG


def test_a_client_that_goes_away_ends_its_work_alone(model: Any, repository: Path) -> None:
    engine, gate = model._engine, threading.Event()
    looks = []

    def is_cancelled() -> bool:  # between the first and the second token
        looks.append(engine.load_figures().running)
        gate.set()
        return True

    engine.on_step = lambda rows: gate.wait(10)
    try:
        found = answer(model, repository, ask(is_cancelled=is_cancelled), ask())
    finally:
        engine.on_step = None
    assert found[0].code() == TritonError.CANCELLED
    assert found[1]["text"].tolist() == [[b"blue"]]
    assert len(looks) == 1


def test_too_much_work_and_failures_have_their_codes(
    model: Any, repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(error: Exception) -> TritonError:
        def submit(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(model._engine, "submit", submit)
        return answer(model, repository, ask())[0]

    assert fail(pgfast.errors.OverloadedError("17 wait")).code() == TritonError.UNAVAILABLE
    assert fail(pgfast.errors.PgfastError("a run failed")).code() == TritonError.INTERNAL
    unexpected = fail(RuntimeError("secret"))
    assert unexpected.code() == TritonError.INTERNAL
    assert "secret" not in unexpected.message()
    assert "secret" in caplog.text


def plain_run(repository: Path, picture: np.ndarray, ids: list[int], count: int) -> list[int]:
    """Greedy tokens from the two graphs, opened from their own folders, without any of pgfast's memory tricks."""
    sessions = {}
    for name in ("vision_encoder", "decoder"):
        file = repository / name / "1" / config_of(repository, name)["default_model_filename"]
        sessions[name] = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (features,) = sessions["vision_encoder"].run(None, {"pixel_values": picture})
    decoder, manifest = sessions["decoder"], Bundle.open(repository / "pgfast" / "1" / "bundle").manifest
    d = manifest.dimensions
    shape = (1, d.num_key_value_heads, manifest.cache_length, d.head_dim)
    cache = {v.name: np.zeros(shape, np.float32) for v in decoder.get_inputs() if v.name.startswith("past")}
    names = [value.name for value in decoder.get_outputs()]
    tokens: list[int] = []
    new, length = ids, 0
    while len(tokens) < count:
        valid = length + features.shape[1] + len(new)
        feeds = {
            "input_ids": np.array([new]),
            "image_features": features,
            "write_indices": np.array([length]),
            "kv_lengths": np.array([valid]),
        }
        found = dict(zip(names, decoder.run(None, feeds | cache), strict=True))
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        tokens.append(int(found["next_token"][0, 0]))
        new, length, features = tokens[-1:], valid, features[:, :0]
    return tokens


def test_the_graphs_serve_a_token_loop_of_ones_own(repository: Path, demo: Engine) -> None:
    wanted = demo.answer(PICTURE, COLOUR)
    prepared = demo.prepare_image(PICTURE)
    spec = demo.manifest.image
    pixels = (prepared.pixels.astype(np.float32) * np.float32(spec.rescale_factor) - np.float32(spec.mean)) / np.float32(
        spec.std
    )
    ids = demo._encode_prompt(demo._answer_prompt(COLOUR, "en"))
    found = plain_run(repository, pixels.transpose(2, 0, 1)[None].astype(np.float32), ids, len(wanted.token_ids))
    assert tuple(found) == wanted.token_ids


def test_the_configuration_names_what_the_graphs_have(repository: Path) -> None:
    for name, batched in (("vision_encoder", True), ("decoder", False)):
        config = config_of(repository, name)
        assert config["name"] == name
        assert config["platform"] == "onnxruntime_onnx"
        assert (config["max_batch_size"] > 0) == batched == ("dynamic_batching" in config)
        session = onnxruntime.InferenceSession(
            repository / name / "1" / config["default_model_filename"], providers=["CPUExecutionProvider"]
        )
        types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
        for nodes, described in ((session.get_inputs(), config["input"]), (session.get_outputs(), config["output"])):
            wanted = []
            for node in nodes:
                dims = [-1 if isinstance(dim, str) else dim for dim in node.shape]
                assert dims[0] == -1
                wanted.append({"name": node.name, "data_type": types[node.type], "dims": dims[1:] if batched else dims})
            assert described == wanted
    config = config_of(repository, "pgfast")
    assert config["backend"] == "python"
    assert config["model_transaction_policy"] == {"decoupled": False}
    assert config["parameters"] == {"provider": {"string_value": "cpu"}}


def test_the_configuration_is_what_tritons_own_schema_allows(repository: Path) -> None:
    """The schema comes with the package tritonclient, whose `grpc` needs more than this one file of it."""
    client = importlib.util.find_spec("tritonclient")
    if client is None or not client.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    path = Path(client.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    from google.protobuf import text_format

    for name in MODELS:
        config = text_format.Parse((repository / name / "config.pbtxt").read_text(), schema.ModelConfig())
        ours = config_of(repository, name)
        assert config.name == name
        assert config.max_batch_size == ours["max_batch_size"]
        assert [list(entry.dims) for entry in config.input] == [entry["dims"] for entry in ours["input"]]
        kinds = {value.name: value.number for value in schema.DataType.DESCRIPTOR.values}
        assert [entry.data_type for entry in config.output] == [kinds[entry["data_type"]] for entry in ours["output"]]


def test_weights_are_on_disk_once(repository: Path) -> None:
    for name in ("vision_encoder", "decoder"):
        for file in (f"{name}.onnx", f"{name}.onnx.data"):
            assert os.path.samefile(repository / name / "1" / file, repository / "pgfast" / "1" / "bundle" / file)
    assert sorted(path.name for path in repository.iterdir()) == sorted(MODELS)


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    export_triton(str(demo_bundle()), tmp_path / "out", ExportOptions())
    copy, original = tmp_path / "out" / "decoder" / "1" / "decoder.onnx.data", demo_bundle() / "decoder.onnx.data"
    assert copy.read_bytes() == original.read_bytes()


def test_a_bundle_is_taken_as_it_is(tmp_path: Path, repository: Path) -> None:
    export_triton(str(demo_bundle()), tmp_path / "out", ExportOptions())
    copy = tmp_path / "out" / "pgfast" / "1" / "bundle"
    assert {path.name for path in copy.iterdir()} == {path.name for path in demo_bundle().iterdir()}
    assert not os.path.samefile(copy / "decoder.onnx.data", demo_bundle() / "decoder.onnx.data")
    for name in MODELS:
        config = (tmp_path / "out" / name / "config.pbtxt").read_text()
        assert config == (repository / name / "config.pbtxt").read_text()


def test_a_bundle_in_the_standard_dialect_names_its_slots(tmp_path: Path) -> None:
    bundle = make_bundle(DEMO_CHECKPOINT, tmp_path / "bundle", dialect="standard")
    manifest = Bundle.open(bundle).manifest
    config = triton.graph_config("decoder", manifest.graphs["decoder"], "cpu", 0)
    dims = {entry["name"]: entry["dims"] for entry in config["input"]}
    assert dims["past_key_values.0.key"][2] == manifest.cache_length


def test_a_bundle_for_cuda_runs_on_the_gpu(tmp_path: Path) -> None:
    export_triton(str(DEMO_CHECKPOINT), tmp_path / "out", ExportOptions("fp16", "cuda"))
    for name in MODELS:
        assert config_of(tmp_path / "out", name)["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    assert config_of(tmp_path / "out", "pgfast")["parameters"]["provider"]["string_value"] == "cuda"
    types = {entry["name"]: entry["data_type"] for entry in config_of(tmp_path / "out", "decoder")["input"]}
    assert types["past_key_values.0.key"] == types["image_features"] == "TYPE_FP16"
    assert types["input_ids"] == "TYPE_INT64"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (DEMO_CHECKPOINT, ExportOptions(target="tensorrt"), "targets cpu and cuda"),
        (DEMO_CHECKPOINT, ExportOptions("bf16", "cuda"), "no bfloat16"),
        (demo_bundle(), ExportOptions("int8"), "takes no options"),
        (DEMO_CHECKPOINT / "nothing", ExportOptions(), "nothing"),
    ],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    tmp_path: Path, source: Path, options: ExportOptions, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_triton(str(source), tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


def test_a_damaged_bundle_leaves_nothing(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(demo_bundle(), tmp_path / "bundle")
    (tmp_path / "bundle" / "decoder.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        export_triton(str(tmp_path / "bundle"), tmp_path / "out", ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    with pytest.raises(ExportError, match="exists"):
        export_triton(str(demo_bundle()), tmp_path / "bundle", ExportOptions())
