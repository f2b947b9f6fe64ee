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
from typing import Any

import fake_server
import pytest
from click.testing import CliRunner
from pgfast.bench.cli import bench
from pgfast.bench.serving import batch_kills, figures, load, malformed, overload, process
from pgfast.bench.serving.baseline import Batch
from pgfast.bench.serving.client import Exchange, Load, closed_loop, open_loop
from pgfast.bench.serving.fuzz import shot
from pgfast.bench.serving.process import Server, watching
from pgfast.bench.serving.questions import picture, question, request
from pgfast.bench.serving.run import FORMAT, measure, read
from pgfast.bench.serving.settings import Settings
from PIL import Image

from pgfast.errors import InputError, PgfastError

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


def exchange(due: float, took: float, status: int = 200, *, number: int = 0, body: bytes = b"", head: bytes = b"") -> Exchange:
    return Exchange(number, due, due, due + took, status, head, body)


# the arithmetic


def test_rate_and_latency_by_hand() -> None:
    seen = Load(10.0, 2.0, [exchange(10.0, i / 100) for i in range(1, 101)], cpu=0.5)
    seen.exchanges += [exchange(11.5, 0.6), exchange(11.0, 0.1, 429), exchange(11.0, 0.2, 0)]  # late; refused; broken
    assert seen.rate() == 50.0
    said = load.describe([seen], server_cpu=1.03)
    assert (said["requests"], said["errors"], said["statuses"]) == (103, 2, {"0": 1, "200": 101, "429": 1})
    # 0.01 to 1.00 and 0.60 again: the 101 values' median is the 51st
    assert said["latency"]["p50"] == pytest.approx(0.51)
    assert said["latency"]["p99"] == pytest.approx(0.99)
    assert said["latency"]["max"] == pytest.approx(1.0)
    assert said["client_cpu_per_request"] == pytest.approx(0.5 / 103)
    assert said["server_cpu_per_request"] == pytest.approx(0.01)
    assert load.latency([]) is None


def test_answers_are_compared_with_the_engines() -> None:
    right = [exchange(0, 1, number=n, body=b'{"text": "t%d"}' % (n % 3)) for n in range(6)]
    others = [exchange(0, 1, body=body) for body in (b'{"text": "t1"}', b"[]", b'{"text": 5}', b"nonsense")]
    refused = [exchange(0, 1, 429, body=b"nonsense")]
    assert load.wrong(right, ["t0", "t1", "t2"], 3) == 0
    assert load.wrong(right + others + refused, ["t0", "t1", "t2"], 3) == 4


def test_slope_of_memory_by_hand() -> None:
    # the first quarter is start-up; then 3 bytes a second
    samples = [(float(i), 50 * i if i < 5 else 1000 + 3 * i) for i in range(20)]
    said = overload.describe_memory(samples)
    assert said["slope_per_minute"] == pytest.approx(180.0)
    assert (said["first"], said["last"], said["peak"]) == (0, 1057, 1057)
    assert overload.describe_memory([])["slope_per_minute"] is None


def test_recovery_by_hand() -> None:
    # capacity 10: 5 answers in half a second are full speed
    times = [0.1, 0.2, 0.3, *(0.6 + i / 20 for i in range(5)), *(1.05 + i / 20 for i in range(4))]
    after = Load(0.0, 1.5, [])
    exchanges = [exchange(100.0, t) for t in times] + [exchange(100.0, 0.4, 429)]
    found = overload.recovery(100.0, exchanges, 10.0, replace(after, start=100.0))
    assert found["windows"] == pytest.approx([0.6, 1.0, 0.8])
    assert found["seconds"] == 1.0
    assert overload.recovery(100.0, exchanges[:3], 10.0, replace(after, start=100.0))["seconds"] is None


def test_overload_by_hand() -> None:
    later = b"HTTP/1.1 429 X\r\nRetry-After: 1\r\n"
    seen = Load(0.0, 2.0, [exchange(0.1, 0.2), exchange(0.5, 0.4), exchange(1.2, 0.9), exchange(1.3, 0.3)], dropped=3)
    seen.exchanges += [exchange(0.2, 0.01, 429, head=later), exchange(0.3, 0.03, 503), exchange(0.4, 0.1, 500)]
    said = overload.describe_overload(seen)
    assert said["accepted"]["share"] == pytest.approx(4 / 7)
    assert said["accepted"]["rate"] == 1.5  # one ended after the load
    assert said["accepted"]["first_half"]["max"] == pytest.approx(0.4)
    assert said["accepted"]["second_half"]["max"] == pytest.approx(0.9)
    assert (said["refused"]["count"], said["refused"]["without_retry_after"], said["other"]) == (2, 1, 1)
    assert said["refused"]["latency"]["p50"] == pytest.approx(0.02)
    assert said["dropped_by_client"] == 3


def test_outcomes_by_hand() -> None:
    outcomes = [shot.Outcome("a", "400", 0.1), shot.Outcome("a", "500", 0.1, b"oh"), shot.Outcome("b", "503", 0.1)]
    outcomes += [shot.Outcome("b", "hung", 20.0), shot.Outcome("b", "closed", 0.1)]
    said = malformed.describe_outcomes(outcomes)
    assert (said["server_errors"], said["hung"]) == (1, 1)
    assert said["server_error_bodies"] == ["a: 500 oh"]
    assert said["kinds"] == {"a": {"400": 1, "500": 1}, "b": {"503": 1, "closed": 1, "hung": 1}}


# the client


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


def part_of(name: str, **others: Any) -> dict[str, Any]:
    took = {"p50": 0.1, "p90": 0.2, "p99": 0.3, "max": 0.4}
    machine = {"processor": "P", "cores": 2, "commit": "c"}
    again = {"rate": 500.0, "latency": took, "wrong": 0, "pictures": 16}
    usage = {"memory": 10**8, "files": 9, "threads": 7}
    parts: dict[str, dict[str, Any]] = {
        "load": {
            "clients": 64,
            "rounds": [{"ratio": 0.9}, {"ratio": 0.8}],
            "ratio": 0.85,
            "batch_rate": 400.0,
            "served": {"requests": 9, "rate": 340.0, "errors": 0, "wrong": 0, "latency": took, "client_cpu_per_request": 5e-5},
            "repeated": again,
            "server_cpu_per_request": 4e-3,
            "batch_cpu_per_answer": 4e-3,
        },
        "overload": {
            "capacity": 340.0,
            "offered_rate": 1020.0,
            "requests": 60_000,
            "dropped_by_client": 0,
            "accepted": {"share": 0.3, "rate": 300.0, "latency": took, "first_half": took, "second_half": took},
            "refused": {"count": 40_000, "latency": took, "without_retry_after": 0},
            "other": 0,
            "client": {"late": took, "cpu_per_request": 5e-5},
            "memory": {"first": 10**8, "last": 10**8, "peak": 10**8, "slope_per_minute": 1e5},
            "recovery": {"windows": [0.5, 1.0], "seconds": 1.0},
            "flags": [],
        },
        "malformed": {
            "requests": 10_000,
            "warm_up": 2000,
            "kinds": {"a": {}},
            "statuses": {"400": 10_000},
            "server_errors": 0,
            "hung": 0,
            "alive": True,
            "answered_in_between": True,
            "right_afterwards": True,
            "usage": {"before": usage, "middle": usage, "after": usage},
            "memory_peak": 10**8,
            "growth_per_request": 10.0,
            "log_trouble": 0,
            "schema_complaints": {},
            "flags": ["--cache-pictures", "0"],
        },
        "batch": {
            "rows": 10_000,
            "kills": 20,
            "kills_while_starting": 2,
            "missing": 0,
            "twice": 0,
            "identical": True,
            "undisturbed_seconds": 30.0,
            "disturbed_seconds": 50.0,
            "lost_seconds_per_kill": 1.0,
            "start_seconds": 0.6,
        },
    }
    return {"date": "d", "machine": machine, "settings": {"seconds": 60.0}} | parts[name] | others


def test_promises_that_are_kept_and_missed() -> None:
    data = {"format": FORMAT, "parts": {name: part_of(name) for name in ("load", "overload", "malformed", "batch")}}
    assert figures.missed(data) == ["overload: p99 until a refusal (429 or 503) 300.0 ms, promised <= 100.0 ms"]
    data["parts"]["load"] = part_of("load", ratio=0.8499)
    data["parts"]["malformed"] = part_of("malformed", alive=False, server_errors=1)
    data["parts"]["overload"]["recovery"] = {"windows": [0.5], "seconds": None}
    data["parts"]["overload"]["refused"]["latency"] = {"p50": 0.01, "p90": 0.01, "p99": 0.01, "max": 0.01}
    assert [line.split(" ", 2)[:2] for line in figures.missed(data)] == [
        ["load:", "answers/s"],
        ["overload:", "seconds"],
        ["malformed:", "server"],
        ["malformed:", "alive,"],
    ]
    assert figures.missed(data, ("batch",)) == []
    table = figures.markdown("x.json", data)
    assert "| load | answers/s over `answer_batch`'s | >= 0.85x | 0.85x | **missed** |" in table
    assert "| overload | seconds until full speed again | <= 2.00 s | not measured | **missed** |" in table
    assert "| load | p99 over p50 | <= 5.00x | 3.00x | met |" in table
    assert "ratios of the rounds 0.90, 0.80" in table


def test_figures_go_between_their_marks(tmp_path: Path) -> None:
    document = tmp_path / "serving.md"
    document.write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    results = tmp_path / "serving.json"
    results.write_text(json.dumps({"format": FORMAT, "parts": {"batch": part_of("batch")}}))
    done = CliRunner().invoke(bench, ["serving", str(results), "-o", str(document)], catch_exceptions=False)
    assert done.exit_code == 0
    text = document.read_text()
    assert text.startswith(f"before\n{figures.BEGIN}\n| | | target")
    assert text.endswith(f"{figures.END}\nafter\n")
    assert "old" not in text
    assert "| load | errors | = 0 | not measured |  |" in text
    figures.write(str(results), read(results), document)
    assert document.read_text() == text
    document.write_text("no place")
    with pytest.raises(InputError, match="no place for figures"):
        figures.write(str(results), read(results), document)
    results.write_text('{"format": 1}')
    with pytest.raises(InputError, match="not a result file of 'pgfast bench serve'"):
        read(results)
