"""The measurement of the server: its arithmetic, and that it notices a server or a batch command that is broken."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import fake_server
import pytest
from pgfast.bench.serving import batch_kills, figures, load, malformed, overload, process
from pgfast.bench.serving.baseline import Batch
from pgfast.bench.serving.client import closed_loop, open_loop
from pgfast.bench.serving.fuzz import shot
from pgfast.bench.serving.process import Server, watching
from pgfast.bench.serving.questions import picture, question, request
from pgfast.bench.serving.run import measure
from pgfast.bench.serving.settings import Settings
from PIL import Image

from pgfast.errors import PgfastError

HERE = Path(__file__).parent
SETTINGS = Settings(clients=16, seconds=0.6, rounds=2, warmup=0.1, requests=60, rows=40, kills=3)
# schemathesis' own dependencies are older than Python's newest warnings
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def fake(fault: str, folder: Path) -> Server:
    return Server([sys.executable, str(HERE / "fake_server.py"), fault], folder / "server.log")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with fake("none", tmp_path) as started:
        yield started


class FakeBaseline:
    """Answers as the fake server does, 400 a second."""

    def answer(self, first: int, count: int) -> Batch:
        texts = [
            fake_server.answer_of(base64.b64encode(picture(0, n)).decode(), question(n)) for n in range(first, first + count)
        ]
        return Batch(seconds=count / 400, cpu=count / 200, texts=texts)


def test_pictures_and_requests_are_all_different_and_pictures() -> None:
    assert len({picture(0, n) for n in range(300)} | {picture(1, n) for n in range(300)}) == 600
    assert picture(0, 5) == picture(0, 5)
    assert Image.open(io.BytesIO(picture(0, 5))).size == (64, 64)
    head, body = request(0, 5).split(b"\r\n\r\n", 1)
    assert f"Content-Length: {len(body)}".encode() in head
    assert base64.b64decode(json.loads(body)["image"]) == picture(0, 5)


def test_closed_loop_keeps_so_many_requests_under_way(server: Server) -> None:
    requests = [request(0, n) for n in range(50)]
    seen = closed_loop(server.address, requests, 16, 0.5)
    assert {e.status for e in seen.exchanges} == {200}
    assert [e.number for e in seen.exchanges] == list(range(len(seen.exchanges)))
    texts = [fake_server.answer_of(**json.loads(r.split(b"\r\n\r\n", 1)[1])) for r in requests]
    assert load.wrong(seen.exchanges, texts, 50) == 0
    # 8 places of 20 ms each, taken by 16 clients: each waits for two
    assert load.latency([e.latency for e in seen.exchanges])["p50"] >= 0.039  # type: ignore[index]
    assert 0 < seen.cpu < 0.5
    events = sorted([(e.sent, 1) for e in seen.exchanges] + [(e.ended, -1) for e in seen.exchanges])
    under_way = [sum(step for _, step in events[: i + 1]) for i in range(len(events))]
    assert max(under_way) == 16


def test_open_loop_sends_on_time_however_long_answers_take(server: Server) -> None:
    seen = open_loop(server.address, [request(0, 1)], 200.0, 1.0, seed=3)
    assert 120 < len(seen.exchanges) < 290  # Poisson with mean 200: six deviations
    gaps = [b.due - a.due for a, b in zip(seen.exchanges, seen.exchanges[1:], strict=False)]
    assert max(gaps) > 3 * sum(gaps) / len(gaps)  # random moments, not a clock
    assert seen.dropped == 0
    again = open_loop(server.address, [request(0, 1)], 200.0, 1.0, seed=3)
    assert len(again.exchanges) == len(seen.exchanges)
    few = open_loop(server.address, [request(0, 1)], 2000.0, 0.3, most=2)
    assert few.dropped > 100
    assert len(few.exchanges) + few.dropped > 400


def test_a_connection_that_breaks_is_an_error(server: Server) -> None:
    broken = request(0, 1).replace(b"Content-Length: ", b"Content-Length: 12345")  # the fake server goes away then
    seen = closed_loop(server.address, [broken, request(0, 2)], 1, 0.3)
    assert {e.status for e in seen.exchanges if e.number % 2 == 0} == {0}
    assert {e.status for e in seen.exchanges if e.number % 2 == 1} == {200}
    assert load.describe([seen])["errors"] == (len(seen.exchanges) + 1) // 2 > 1
    server.close()
    with pytest.raises(PgfastError, match="takes no connection"):
        closed_loop(server.address, [request(0, 2)], 1, 0.1)


# servers that are broken


def test_load_on_a_good_and_on_bad_servers(tmp_path: Path) -> None:
    with fake("none", tmp_path) as server:
        good = load.measure_load(SETTINGS, server, FakeBaseline())  # type: ignore[arg-type]
    assert (good["served"]["errors"], good["served"]["wrong"], good["repeated"]["wrong"]) == (0, 0, 0)
    assert good["batch_rate"] == pytest.approx(400)
    assert good["ratio"] == pytest.approx(sum(r["served"]["rate"] for r in good["rounds"]) / 2 / 400)
    assert good["server_cpu_per_request"] > 0
    with fake("bad", tmp_path) as server:
        bad = load.measure_load(SETTINGS, server, FakeBaseline())  # type: ignore[arg-type]
    assert bad["served"]["errors"] > 20
    assert bad["served"]["wrong"] == bad["served"]["statuses"]["200"] > 20


def test_overload_on_a_good_and_on_bad_servers(tmp_path: Path) -> None:
    found = {}
    for fault in ("none", "rude"):
        with fake(fault, tmp_path) as server:
            found[fault] = overload.measure_overload(SETTINGS, server)
    good = found["none"]
    assert good["other"] == good["refused"]["without_retry_after"] == 0
    assert good["refused"]["count"] > good["requests"] / 4
    assert good["offered_rate"] == pytest.approx(3 * good["capacity"], rel=0.2)
    assert good["recovery"]["seconds"] is not None
    assert found["rude"]["refused"]["without_retry_after"] == found["rude"]["refused"]["count"] > 0
    assert found["rude"]["refused"]["latency"]["p50"] > 0.4 > good["refused"]["latency"]["p99"]
    held = {fault: part["memory"]["peak"] - part["memory"]["first"] for fault, part in found.items()}
    assert held["rude"] > 10e6 > held["none"]


@pytest.mark.parametrize("fault", ["none", "bad"])
def test_malformed_requests_on_a_good_and_on_a_bad_server(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "QUIET", 0.2)
    wanted = fake_server.answer_of(base64.b64encode(picture(0, 0)).decode(), question(0))
    with fake(fault, tmp_path) as server:
        part = figures.derived("malformed", malformed.measure_malformed(SETTINGS, server, wanted, lambda line: None))
    assert part["requests"] == sum(part["statuses"].values()) == SETTINGS.requests
    assert part["hung"] == 0
    good = fault == "none"
    assert part["well"] is good  # the bad one's answer is wrong
    assert part["alive"] is part["answered_in_between"] is True
    assert (part["server_errors"] == 0) is good
    assert (part["log_trouble"] == 0) is good
    assert (part["more_threads"] <= 0) is good
    assert (part["growth_per_request"] < 100_000) is good


def test_a_server_that_malformed_requests_end_is_noticed(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS, parts=("malformed",), serve=(sys.executable, str(HERE / "fake_server.py"), "dies"), work=tmp_path
    )
    with pytest.raises(PgfastError, match="the server ended with code 3 during malformed: it printed nothing"):
        measure(replace(settings, malformed_flags=()), tmp_path / "serving.json")


def test_a_server_that_hangs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shot, "HUNG", 0.2)
    with fake("stuck", tmp_path) as server:
        outcome = asyncio.run(shot.fire(server.address, "x", shot.Shot(shot.post(b"nonsense"))))
        fine = asyncio.run(shot.fire(server.address, "x", shot.Shot(shot.post(b'{"image": "a", "question": "b"}'))))
        left = asyncio.run(shot.fire(server.address, "x", shot.Shot(shot.post(b"", length=5), whole=False)))
    assert (outcome.result, fine.result, left.result) == ("hung", "200", "went away")


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PgfastError, match=r"ended with code 3: no such thing"):
        Server([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"], tmp_path / "log")
    with pytest.raises(PgfastError, match="not ready within 0 s"):
        Server([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", patience=0.2)


def test_usage_is_that_of_the_process_and_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, runpy; "
        "child = subprocess.Popen([sys.executable, '-c', 'x = bytes(1) * 50_000_000; print(1, flush=True); input()'], "
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE); child.stdout.readline(); "
        f"sys.argv[0:1] = ['', 'none']; runpy.run_path({str(HERE / 'fake_server.py')!r}, run_name='__main__')"
    )
    with Server([sys.executable, "-c", code], tmp_path / "log") as server, watching(lambda: 1, 0.01) as samples:
        usage = server.usage()
        while len(samples) < 3:
            time.sleep(0.01)
    assert usage.memory > 60e6
    assert usage.threads >= 2
    assert usage.cpu > 0
    assert server.usage() == type(usage)(0, 0, 0, 0.0)


def test_every_kind_of_shot_is_made_from_its_seed() -> None:
    for kind, make in malformed.KINDS.items():
        shots = [make(Random(f"1/{n}")) for n in range(12)]
        assert shots[:5] == [make(Random(f"1/{n}")) for n in range(5)], kind
        assert len({s.data for s in shots}) > 5, kind


# batch

BATCH = """
import json, pathlib, sys, time
fault, job, out = sys.argv[1:]
done = len(pathlib.Path(out).read_bytes().splitlines()) if pathlib.Path(out).exists() else 0
with open(out, "ab") as file:
    for number, line in enumerate(pathlib.Path(job).read_text().splitlines()):
        row = json.loads(line)
        if number < done - (fault == "twice") or (fault == "loses" and done and number == done):
            continue
        time.sleep(0.01)
        file.write(json.dumps({"id": row["id"]}).encode() + b"\\n")
        file.flush()
"""


@pytest.mark.parametrize(
    ("fault", "missing", "twice"), [("none", False, False), ("twice", False, True), ("loses", True, False)]
)
def test_kills_of_a_batch_job(fault: str, missing: bool, twice: bool, tmp_path: Path) -> None:
    (tmp_path / "batch.py").write_text(BATCH)
    settings = replace(SETTINGS, batch=(sys.executable, str(tmp_path / "batch.py"), fault))
    said = batch_kills.measure_batch(settings, tmp_path / "work", lambda line: None)
    assert said["kills"] == 3
    assert said["lives"][-1]["rows"] > 0
    assert (said["missing"] > 0) == missing
    assert (said["twice"] > 0) == twice
    assert said["identical"] == (fault == "none")
    lives = said["lives"]
    assert said["disturbed_seconds"] > sum(life["seconds"] for life in lives)
    assert said["undisturbed_seconds"] > 0.4
    assert said["unknown"] == 0


def test_a_batch_command_that_fails_says_why(tmp_path: Path) -> None:
    settings = replace(SETTINGS, batch=(sys.executable, "-c", "import sys; print('no model'); sys.exit(2)"))
    with pytest.raises(PgfastError, match="ended with code 2: no model"):
        batch_kills.measure_batch(settings, tmp_path / "work", lambda line: None)


# figures
