"""Engines in the actors of a local Ray with two cores: answers of one process, bad rows, deaths."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

import pgfast
from pgfast.errors import ClusterError, InputError
from pgfast.scale import PgfastProcessorConfig, build_processor
from pgfast.scale.cluster import Cluster, place
from pgfast.scale.serving import FailureCount, Replica
from pgfast.scale.worker import ERROR, EngineWorker

ray: Any = pytest.importorskip("ray")
pyarrow: Any = pytest.importorskip("pyarrow")

PICTURE = Path(pgfast.__file__).parent / "demo" / "blue_circle.png"
COLOR, SHAPE = "what color is the shape?", "what shape is in the image?"
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]  # its own settings
TWO = PgfastProcessorConfig(concurrency=2, batch_size=16, should_continue_on_error=True)


def children(parent: int) -> dict[int, str]:
    """All processes below one, with their titles."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it is gone
            continue
    found, below = {}, {parent}
    while below := {number for number, above in parents.items() if above in below}:
        found |= {number: titles.get(number, "") for number in below}
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="pgfast-ray-", dir="/tmp")  # short: names of sockets have a limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        memory = 80 * 2**20
        ray.init(
            "local", num_cpus=2, include_dashboard=False, object_store_memory=memory, log_to_driver=False, _temp_dir=folder
        )
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            mine = children(os.getpid())
            ray.shutdown()
            end = time.monotonic() + 20
            while (left := [number for number in mine if Path(f"/proc/{number}").exists()]) and time.monotonic() < end:
                time.sleep(0.1)
            shutil.rmtree(folder, ignore_errors=True)
            assert len(mine) >= 3
            assert not left


@pytest.fixture(scope="module")
def engine() -> Iterator[pgfast.Engine]:
    with pgfast.load(threads=1) as engine:
        yield engine


def dataset(rows: list[dict[str, Any]], blocks: int = 8) -> Any:
    data = ray.data.from_items(rows, override_num_blocks=min(blocks, len(rows)))
    data.context.execution_options.preserve_order = True
    return data


def open_picture(row: dict[str, Any]) -> dict[str, Any]:
    """The picture of a row in the three forms that an engine takes."""
    import numpy as np
    from PIL import Image

    path = row["path"]
    if row["id"] % 3 == 0:
        return {"image": path}
    if row["id"] % 3 == 1:
        return {"image": Path(path).read_bytes()}
    with Image.open(path) as picture:
        return {"image": np.asarray(picture.convert("RGB"))}


def questions(count: int) -> list[dict[str, Any]]:
    rows = [{"id": i, "path": str(PICTURE), "question": COLOR if i % 4 < 2 else SHAPE} for i in range(count)]
    return [row | {"choices": ["red", "blue", "circle"] if row["id"] % 5 == 0 else None} for row in rows]


@pytest.mark.usefixtures("cluster")
def test_two_workers_answer_as_one_process(engine: pgfast.Engine) -> None:
    rows = questions(150)
    result = build_processor(TWO, open_picture)(dataset(rows)).take_all()
    assert [{key: row[key] for key in rows[0]} for row in result] == rows
    for row in result:
        answer = engine.answer(PICTURE, row["question"], choices=row["choices"])
        assert (row["text"], row["finish_reason"], row[ERROR]) == (answer.text, answer.finish_reason, "")
        assert row["confidence"] == pytest.approx(answer.confidence, rel=1e-4)
        assert row["token_logprobs"] == pytest.approx(answer.token_logprobs, abs=1e-4)
        assert row["choice_probabilities"] == pytest.approx(list((answer.choices or {}).values()), abs=1e-4)


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    died = tmp_path / "died"

    def die_once(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 100 and not died.exists():
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": "/nonexistent.png" if row["id"] == 7 else row["path"]}

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "said": row["text"], "worker": os.getpid()}

    rows = questions(200)
    result = build_processor(TWO, die_once, finish)(dataset(rows)).take_all()
    assert [row["id"] for row in result] == list(range(200))
    want = ["blue" if row["question"] == COLOR else "circle" for row in rows]
    assert [row["said"] for row in result] == [None if i == 7 else said for i, said in enumerate(want)]
    assert [i for i, row in enumerate(result) if row[ERROR]] == [7]
    dead = int(died.read_text())
    assert not Path(f"/proc/{dead}").exists()
    assert dead not in {row["worker"] for row in result[100:116]}  # the batch that it had
    assert len({row["worker"] for row in result} - {None}) >= 2


def test_batch_on_ray_goes_on_after_a_kill_and_writes_what_one_process_writes(cluster: str, tmp_path: Path) -> None:
    rows = [
        {"id": f"q{i}", "image": "missing.png" if i == 7 else "blue.png", "question": (COLOR, SHAPE)[i % 2]} for i in range(600)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(PICTURE, tmp_path / "blue.png")
    command = [sys.executable, "-m", "pgfast", "batch", "in.jsonl", "ray.jsonl", "--engine-cpus", "1", "--ray", cluster]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    with first:
        while not (out := tmp_path / "ray.jsonl").exists() or out.read_bytes().count(b"\n") < 100:
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        first.kill()
    assert out.read_bytes().count(b"\n") < 600
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # there is an error row
    assert "600 rows, 1 of them errors" in done.stderr
    alone = [*command[:5], "alone.jsonl", "--threads", "1"]
    subprocess.run(alone, cwd=tmp_path, capture_output=True, check=False)
    assert records(tmp_path / "ray.jsonl") == records(tmp_path / "alone.jsonl")
    assert [row["id"] for row in records(tmp_path / "ray.jsonl")] == [row["id"] for row in rows]


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of an OUT; confidences to the digits that do not depend on how questions were batched."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line | {"confidence": line["confidence"] and round(line["confidence"], 4)} for line in lines]


@pytest.fixture
def server(cluster: str, tmp_path: Path) -> Iterator[str]:
    """`pgfast serve --ray` with two engines and a key; gives its address."""
    (tmp_path / "keys").write_text("s3cret\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pgfast", "serve", "--port", str(port), "--api-key-file", str(tmp_path / "keys")]
    command += ["--engines", "2", "--engine-cpus", "1", "--ray", cluster]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            while "2 engines" not in said:
                said = process.stderr.readline()
                assert said, process.wait()
            yield f"http://127.0.0.1:{port}"
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_two_replicas_answer_like_the_engine_and_one_may_die(cluster: str, server: str, engine: pgfast.Engine) -> None:
    client = httpx.Client(base_url=server, headers={"authorization": "Bearer s3cret"}, timeout=30)
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    ask = {"image": picture, "question": COLOR, "choices": ["red", "blue"]}
    want = engine.answer(PICTURE, COLOR, choices=["red", "blue"])

    def check(response: httpx.Response) -> None:
        assert response.status_code == 200, response.text
        assert response.json()["text"] == want.text
        assert response.json()["confidence"] == pytest.approx(want.confidence, rel=1e-4)
        assert response.json()["choices"] == pytest.approx(want.choices, abs=1e-4)

    with client:
        assert client.get("/readyz").text == "ready\n"
        assert client.post("/v1/answer", json=ask, headers={"authorization": "Bearer wrong"}).status_code == 401
        refused = client.post("/v1/answer", json=ask | {"question": " "})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "prompt_error")
        with ThreadPoolExecutor(8) as pool:
            for response in pool.map(lambda _: client.post("/v1/answer", json=ask), range(64)):
                check(response)
        with client.stream("POST", "/v1/answer?stream=1", json={"image": picture, "question": SHAPE}) as response:
            text = response.read().decode()
        assert "event: piece\ndata: " in text
        assert json.loads(text.split("event: answer\ndata: ")[1])["text"] == engine.answer(PICTURE, SHAPE).text
        first, second = replicas()
        os.kill(first, signal.SIGKILL)
        for _ in range(32):
            check(client.post("/v1/answer", json=ask))
        assert second in replicas()


def replicas() -> list[int]:
    """Processes that hold an engine of the server."""
    return [number for number, title in children(os.getpid()).items() if title.startswith("ray::ServeReplica:pgfast")]


def worker(**changes: Any) -> EngineWorker:
    arguments = {"bundle": None, "provider": "cpu", "threads": 1, "preprocess": None, "postprocess": None, "keep_errors": True}
    return EngineWorker(**(arguments | changes))


def test_prompts_options_and_postprocess(engine: pgfast.Engine) -> None:
    ask = {
        "image": str(PICTURE),
        "prompt": f"answer en {COLOR}",
        "question": None,
        "options": {"max_new_tokens": 1, "seed": None},
    }
    table = pyarrow.Table.from_pylist([{"id": i, "text": "the row's own"} | ask for i in range(3)])
    answer = engine.generate(PICTURE, f"answer en {COLOR}", options=pgfast.GenerateOptions(max_new_tokens=1))
    assert answer.finish_reason == "length"

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "said": row["text"], "why": row["finish_reason"]}

    said = [{"id": i, "said": answer.text, "why": "length"} for i in range(3)]
    assert worker(postprocess=finish, keep_errors=False)(table) == {key: [row[key] for row in said] for key in said[0]}
    result = worker()(table)
    assert result.column_names == [
        *("id", "image", "prompt", "question", "options"),
        *("text", "confidence", "finish_reason", "token_logprobs", "calibrated", "unsure_of", "choice_probabilities", ERROR),
    ]
    assert result["text"].to_pylist() == [answer.text] * 3
    assert result.schema.field("choice_probabilities").type == pyarrow.list_(pyarrow.float64())  # though no row has any


def test_a_row_that_cannot_be_answered_says_why() -> None:
    rows: list[dict[str, Any]] = [{"id": i, "path": str(PICTURE), "question": COLOR, "prompt": None} for i in range(8)]
    rows[1]["path"] = "/nonexistent.png"
    rows[2]["question"] = " "
    rows[3]["prompt"] = "caption en"
    rows[4]["path"] = None
    rows[5]["options"] = {"heat": 1}
    table = pyarrow.Table.from_pylist([{"options": None} | row for row in rows])

    def read(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": Path(row["path"]).read_bytes()}

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "said": row["text"]}

    result = worker(preprocess=read, postprocess=finish)(table)
    assert result["id"] == list(range(8))
    for error, part in zip(
        result[ERROR],
        ("", "nonexistent.png", "question is empty", "either a question or a prompt", "NoneType", "heat", "", ""),
        strict=True,
    ):
        assert part in error
        assert bool(part) == bool(error)
    assert result["said"] == ["blue", None, None, None, None, None, "blue", "blue"]
    without = worker(preprocess=read)(table)
    assert without["text"].to_pylist() == [said or "" for said in result["said"]]
    with pytest.raises(FileNotFoundError):
        worker(preprocess=read, keep_errors=False)(table.slice(1, 1))
    with pytest.raises(InputError, match="question is empty"):
        worker(preprocess=read, keep_errors=False)(table.slice(2, 1))


def test_values_out_of_range_are_refused() -> None:
    for values in ({"concurrency": 0}, {"concurrency": (3, 2)}, {"batch_size": 0}, {"num_cpus": -1}):
        with pytest.raises(InputError):
            PgfastProcessorConfig(**values)


def run_pgfast(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pgfast", *args], capture_output=True, text=True, check=False)


def test_what_cannot_be_a_cluster_is_refused_at_once(tmp_path: Path) -> None:
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"image": str(PICTURE), "question": COLOR}) + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for args, part in (
        (["--ray", "nowhere"], "'nowhere' is no address of a Ray cluster: give host:port"),
        (["--ray", f"127.0.0.1:{port}"], "'ray start --head' begins one"),
        (["--engines", "2"], "--engines goes with --ray"),
    ):
        done = run_pgfast("batch", str(rows), str(tmp_path / "out.jsonl"), *args)
        assert done.returncode == 2
        assert part in done.stderr
    done = run_pgfast("serve", "--port", "0", "--ray")
    assert (done.returncode, "give one with --port" in done.stderr) == (2, True)


def test_without_ray_it_says_what_to_install() -> None:
    code = "import sys\nsys.modules['ray'] = None\nfrom pgfast.cli import main\nmain(['serve', '--port', '9', '--ray'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "pgfast: error: ray is not installed: pip install 'pgfast[scale]'\n"


@pytest.mark.usefixtures("cluster")
def test_as_many_engines_as_fit() -> None:
    def placed(engine_cpus: int, engines: int | None = None) -> tuple[int, int, int]:
        return dataclasses.astuple(place(Cluster("auto", engines, engine_cpus, None, "auto", None)))

    assert placed(1) == (2, 1, 0)
    assert placed(2) == (1, 2, 0)
    assert placed(1, 5) == (5, 1, 0)
    with pytest.raises(ClusterError, match="the largest node has 2 cores"):
        placed(3)


def test_a_replica_whose_answers_all_fail_is_unhealthy() -> None:
    statuses = iter([500, 200, 500, 429, 500, 500, 500, 500])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": next(statuses), "headers": []})

    async def ask(counted: FailureCount) -> None:
        async def send(message: Any) -> None:
            assert message["status"]

        await counted({"type": "http", "method": "POST", "path": "/v1/answer"}, send, send)

    replica = Replica.__new__(Replica)
    replica._watched = FailureCount(app)
    for failures in (1, 0, 1, 1, 2, 3, 4):
        asyncio.run(ask(replica._watched))
        assert replica._watched.in_a_row == failures
        replica.check_health()
    asyncio.run(ask(replica._watched))
    with pytest.raises(RuntimeError, match="the last 5 answers failed"):
        replica.check_health()
