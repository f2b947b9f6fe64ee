"""`pgfast batch` killed, interrupted and out of disk: the same command goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from batch_data import command, lines_of, make_rows, run, whole_outputs

ROWS = 480


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return whole_outputs(data, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_killed_at_random_moments_it_ends_as_if_never_killed(
    kind: str, data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, kills, moments = tmp_path / f"out.{kind}", 0, random.Random(kind)
    for _ in range(20):
        wanted = lines_of(out) + moments.randrange(1, ROWS // 6)
        with subprocess.Popen(command(data / "rows.jsonl", out), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and lines_of(out) < wanted:
                time.sleep(0.001)
            if kills < 5:
                time.sleep(moments.random() / 100)
                process.kill()
            code = process.wait()
        if code != -signal.SIGKILL:
            break
        kills += 1
        assert whole[kind].startswith(out.read_bytes())
    assert kills >= 3
    assert code == 1  # as without kills: some rows are bad
    assert out.read_bytes() == whole[kind]


def test_ctrl_c_stops_it_and_the_same_command_goes_on(data: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with subprocess.Popen(command(data / "rows.jsonl", out), stderr=subprocess.PIPE, text=True) as process:
        while lines_of(out) < 3:
            time.sleep(0.001)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in error.splitlines() if line][-2:] == [
        f"pgfast: {lines_of(out)} rows are in {out}; the same command goes on",
        "pgfast: interrupted",
    ]
    assert whole["jsonl"].startswith(out.read_bytes())
    assert lines_of(out) < ROWS
    again = run(data / "rows.jsonl", out, "--json")
    assert json.loads(again.stdout)["answered_now"] < ROWS
    assert out.read_bytes() == whole["jsonl"]


def test_a_full_disk_ends_it_with_one_line_and_it_goes_on_later(data: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A limit on the size of files is the nearest thing to a full disk that a test can make."""
    size = len(whole["jsonl"]) // 2 + 7

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    out = tmp_path / "out.jsonl"
    full = run(data / "rows.jsonl", out, preexec_fn=limit)
    assert full.returncode == 2
    assert [line for line in full.stderr.splitlines() if "error" in line] == [
        f"pgfast: error: {out} cannot be written: File too large; mend that and run the same command again"
    ]
    assert out.stat().st_size == size
    assert run(data / "rows.jsonl", out).returncode == 1
    assert out.read_bytes() == whole["jsonl"]
