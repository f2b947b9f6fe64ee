"""The arithmetic of the server's figures against values by hand, and the table made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pgfast.bench.cli import bench
from pgfast.bench.serving import figures, load, malformed, overload
from pgfast.bench.serving.client import Exchange, Load
from pgfast.bench.serving.fuzz import shot
from pgfast.bench.serving.run import FORMAT, read
from pgfast.bench.serving.settings import Settings

from pgfast.errors import InputError

SETTINGS = Settings(clients=16, seconds=0.6, rounds=2, warmup=0.1, requests=60, rows=40, kills=3)


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
