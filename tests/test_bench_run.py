"""`pgfast bench run` end to end on a random checkpoint: the same function for all, one file, its report, its comparison."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Shape, make_bundle, make_checkpoint
from pgfast.bench import summary
from pgfast.bench.cli import bench
from pgfast.bench.client import Worker, WorkerError
from pgfast.bench.contenders import Spec
from pgfast.bench.contenders.pgfast_engine import PgfastEngine
from pgfast.bench.participants import choose
from pgfast.bench.prepare import prepare
from pgfast.bench.report import read_results
from pgfast.bench.run import measure
from pgfast.bench.settings import Settings
from pgfast.bench.synth import config_of
from pgfast.bench.workloads import WORKLOADS, Requests, read_message
from pgfast.export.plan import ExportOptions
from pgfast.export.transformersjs import export_transformersjs

from pgfast.bundle import Bundle
from pgfast.errors import InputError
from pgfast.loading import demo_bundle
from pgfast.runtime.generation import Generation

PEERS = ("transformers fp32", "onnx fp32", "openvino fp32")
MEASURED = ("short", "long", "questions", "batch-1", "batch-4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied checkpoint (a tied one with random weights repeats itself), its fp32 bundle and its stock export."""
    folder = tmp_path_factory.mktemp("bench")
    make_checkpoint(folder / "checkpoint", Shape(tied=False))
    make_bundle(folder / "checkpoint", folder / "fp32")
    export_transformersjs(str(folder / "checkpoint"), folder / "stock", ExportOptions("fp32"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _quick_ceilings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgfast.bench.machine.SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    """A run through the command line, with every peer that is installed."""
    words = ["run", str(folder / "checkpoint"), "-b", str(folder / "fp32"), "--stock", str(folder / "stock")]
    words += [word for name in MEASURED for word in ("--workload", name)] + [
        word for peer in PEERS for word in ("--peer", peer)
    ]
    words += ["--rounds", "2", "--starts", "1", "--threads", "2", "-o", str(folder / "out")]
    done = CliRunner().invoke(bench, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "out" / "results.json"


@pytest.fixture
def data(results: Path) -> dict[str, Any]:
    return read_results(results)


def installed(data: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in data["contenders"]]


def test_all_make_the_same_tokens(data: dict[str, Any]) -> None:
    """fp32 peers and pgfast fp32 compute one function, alone and in batches: a ratio compares equal work."""
    assert {"pgfast fp32", "transformers fp32", "onnx fp32"} <= set(installed(data))
    tokens: dict[tuple[str, int], dict[str, list[list[int]]]] = {}
    for sample in data["samples"]:
        tokens.setdefault((sample["workload"], sample["round"]), {})[sample["contender"]] = sample["tokens"]
    assert set(tokens) == {(name, number) for name in MEASURED for number in range(3)}
    for (name, _), by_contender in tokens.items():
        assert set(by_contender) == set(installed(data))
        assert all(rows == by_contender["pgfast fp32"] for rows in by_contender.values())
        rows = by_contender["pgfast fp32"]
        assert len(rows) == max(WORKLOADS[name].batch, WORKLOADS[name].questions)
        assert all(len(row) == WORKLOADS[name].new_tokens or row[-1] == 1 for row in rows)
    assert len({token for rows in tokens["long", 1].values() for token in rows[0]}) > 2
    probes = data["probes"]
    assert all(probe["tokens"] == probes["transformers fp32"]["tokens"] for probe in probes.values())
    assert all(abs(p["first_logprob"] - probes["transformers fp32"]["first_logprob"]) < 1e-3 for p in probes.values())


def test_contenders_take_turns(data: dict[str, Any]) -> None:
    order = [(sample["workload"], sample["round"], sample["contender"]) for sample in data["samples"]]
    assert data["groups"] == [installed(data)]
    assert order == [(w, r, name) for w in MEASURED for r in range(3) for name in installed(data)]


def test_the_file_says_what_was_measured_and_where(data: dict[str, Any], folder: Path) -> None:
    machine, bundle = data["machine"], next(e["bundle"] for e in data["contenders"] if e["ours"])
    assert machine["cores"] == os.cpu_count()
    assert {"pgfast", "onnxruntime", "torch", "transformers"} <= set(machine["versions"])
    assert bundle["digest"] == Bundle.open(folder / "fp32").manifest.digest()
    assert len(data["ceilings"]) == 2
    assert all({"read_bytes", "copy_bytes", "fp32_flops", "int8_flops"} == set(measured) for measured in data["ceilings"])
    assert all(value > 1e8 for measured in data["ceilings"] for value in measured.values())
    for start in data["starts"]:
        assert 0 < start["load"] < start["first_answer"] <= start["cold"]
        assert start["memory"]["peak"] > 10**7
    for sample in data["samples"]:
        assert 0 < sample["ttft"] <= sample["total"]
    assert data["model"]["positions"]["short"] == 16 + 10


def test_the_second_question_skips_the_vision_encoder(data: dict[str, Any]) -> None:
    for sample in summary.samples(data, "pgfast fp32", "questions"):
        assert len(sample["each"]) == 10
        assert sample["vision"] > 0
        assert sample["later_vision"] == 0
        assert sum(sample["each"]) == pytest.approx(sample["total"], rel=0.01)


def test_the_first_token_of_a_batch_counts_from_the_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = PgfastEngine(Spec("pgfast", "pgfast", str(folder / "fp32"), str(folder / "fp32"), "fp32", threads=2))
    request = read_message(Requests(Bundle.open(folder / "fp32")).message(WORKLOADS["batch-16"], 0))
    first: list[float] = []
    advance = Generation.advance

    def timed(row: Generation, *result: Any) -> int | None:
        if not row.token_ids:
            first.append(time.perf_counter())
        return advance(row, *result)

    monkeypatch.setattr(Generation, "advance", timed)
    start = time.perf_counter()
    outcome = contender.answer(request)
    assert len(first) == 16
    assert max(first) - start <= outcome.ttft + 1e-3
    assert outcome.ttft <= outcome.total


def test_the_report(results: Path, data: dict[str, Any]) -> None:
    text, page = ((results.parent / name).read_text() for name in ("report.md", "report.html"))
    for name in installed(data):
        assert f"| {name} |" in text
        assert f"<td>{name}</td>" in page
    for title in ("Accuracy of these bundles", "Start and memory", "Roofline", "The same function", "Skipped"):
        assert f"## {title}" in text
    assert page.count("<svg") == 3
    assert not re.search(r'(?:src|href)="(?!#)', page)  # one file: links lead inside
    assert all((results.parent / name).is_file() for name in re.findall(r"\]\((.*\.svg)\)", text))
    p50 = summary.percentiles(summary.values(data, "pgfast fp32", "long", "total"))[0]
    assert f"{p50 * 1000:.1f} ms" in text


def test_peers_that_cannot_take_part_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else object())
    peers = ("openvino fp32", "onnx fp32", "transformers bf16 compiled")
    entries, skipped = choose(Settings((folder / "fp32",), folder / "checkpoint", peers=peers), [Bundle.open(folder / "fp32")])
    assert [entry.spec.name for entry in entries] == ["pgfast fp32"]
    reasons = [row["reason"] for row in skipped]
    assert reasons[0] == "openvino is not installed: pip install openvino"
    assert "no stock ONNX export given" in reasons[1]
    assert "GPU only" in reasons[2]


def test_a_broken_peer_is_a_row_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    stock = tmp_path / "stock" / "onnx"
    stock.mkdir(parents=True)
    for path in (folder / "stock" / "onnx").iterdir():
        (stock / path.name).write_bytes(path.read_bytes() if path.name != "vision_encoder.onnx" else b"not ONNX")
    peers = ("onnx fp32", "transformers fp32")
    bundles = (folder / "fp32",)
    settings = Settings(bundles, stock=tmp_path / "stock", peers=peers, workloads=("short",), rounds=1, starts=1)
    data = measure(settings, tmp_path / "results.json")
    skipped = {row["contender"]: row["reason"] for row in data["skipped"]}
    assert "ended with code 1" in skipped["onnx fp32"]
    assert "vision_encoder.onnx" in skipped["onnx fp32"]
    assert skipped["transformers fp32"] == "no checkpoint given"
    assert len(summary.samples(data, "pgfast fp32", "short")) == 1
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(data))


def test_a_worker_that_dies_or_hangs_is_noticed() -> None:
    demo = str(demo_bundle())
    spec = Spec("pgfast fp32", "pgfast", demo, demo, "fp32", 1)
    message = Requests(Bundle.open(demo_bundle())).message(WORKLOADS["short"], 0)
    with Worker(spec) as worker:
        assert worker.ask(do="answer", request=message)["total"] > 0
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="killed"):
            worker.ask(do="answer", request=message)
    with Worker(spec, timeout=20) as worker:
        worker._timeout = 0.5
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match="no reply within"):
            worker.ask(do="answer", request=message)


def test_rounds_have_pictures_of_their_own() -> None:
    from pgfast.bench.workloads import read_message

    requests = Requests(Bundle.open(demo_bundle()))
    first, again, second = (read_message(requests.message(WORKLOADS["batch-4"], number)) for number in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first.pictures, again.pictures, strict=True))
    different = [*first.pictures, *second.pictures]
    assert len({picture.tobytes() for picture in different}) == 8
    assert requests.positions(WORKLOADS["short"]) == 64 + 10


@pytest.mark.parametrize(
    ("words", "message"),
    [({"bundles": ()}, "no bundle"), ({"peers": ("vllm",)}, "unknown peer"), ({"workloads": ("huge",)}, "unknown workload")],
)
def test_wrong_words_are_refused(words: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        measure(Settings(**({"bundles": (demo_bundle(),)} | words)), tmp_path / "results.json")


def run_compare(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], *options: str) -> Any:
    for name, content in (("a", before), ("b", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return CliRunner().invoke(bench, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])


def test_compare_finds_what_became_slower(data: dict[str, Any], tmp_path: Path) -> None:
    assert run_compare(tmp_path, data, data).exit_code == 0
    slowed = copy.deepcopy(data)
    for sample in slowed["samples"]:
        if (sample["contender"], sample["workload"]) == ("onnx fp32", "long"):
            sample["total"] *= 20
    done = run_compare(tmp_path, data, slowed)
    assert done.exit_code == 1
    worse = [line for line in done.output.splitlines() if line.startswith("WORSE")]
    assert worse
    assert all("onnx fp32, long" in line for line in worse)
    assert any("end to end" in line for line in worse)
    assert run_compare(tmp_path, slowed, data).exit_code == 0
    assert run_compare(tmp_path, data, slowed, "--threshold", "1000").exit_code == 0
    for start in slowed["starts"]:
        start["memory"]["peak"] *= 2
    assert "WORSE" in run_compare(tmp_path, data, slowed).output
    assert "peak memory" in run_compare(tmp_path, data, slowed).output


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="not a result file"):
        read_results(tmp_path / "results.json")


def test_one_command_makes_what_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name instead of a checkpoint, here of a model that was made small."""
    raw = copy.deepcopy(config_of("3b-224"))
    raw["text_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    raw["text_config"] |= {"vocab_size": 512}
    raw["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    raw["vision_config"] |= {"image_size": 28}
    raw |= {"image_token_index": 448, "hidden_size": 64, "projection_dim": 64}
    raw["vision_config"]["projection_dim"] = 64
    monkeypatch.setattr("pgfast.bench.synth.config_of", lambda model: raw)
    words = ["run", "3b-224", "--work", str(tmp_path / "work"), "--peer", "onnx fp32", "--workload", "short"]
    words += ["--rounds", "1", "--starts", "1", "-o"]
    done = CliRunner().invoke(bench, [*words, str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    prepare("3b-224", tmp_path / "work", ("int8", "int4"), pytest.fail)  # everything is there: it says nothing
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    data = read_results(tmp_path / "out" / "results.json")
    assert data["groups"] == [["pgfast int8", "pgfast int4", "onnx fp32"]]
    assert all(summary.ratio(data, ours, "onnx fp32", "short", "total") for ours in ("pgfast int8", "pgfast int4"))
    done = CliRunner().invoke(bench, ["performance", str(tmp_path / "out" / "results.json")], catch_exceptions=False)
    assert re.search(r"\| load to first answer, int4, warm page cache \| <= 4.00 s \| [\d.]+ m?s \|", done.output)
