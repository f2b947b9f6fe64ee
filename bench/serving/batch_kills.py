"""`pgfast batch` killed at random moments and started again, against a run that nobody disturbed."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pgfast.errors import PgfastError

from .questions import picture, question
from .settings import Settings

STARTING = 0.15
"""Share of the lives that end before the first row."""
A_MOMENT = 0.01
"""Seconds, about what a few rows take."""
Part = dict[str, Any]


def measure_batch(settings: Settings, folder: Path, say: Callable[[str], None]) -> Part:
    """Run the job undisturbed, then with kills, and compare the two outputs.

    Args:
        settings: Rows, kills, the command.
        folder: Emptied and filled.
        say: Called with a line of progress.

    Raises:
        PgfastError: The command failed without being killed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = make_job(folder, settings.rows, settings.seed)
    command = [*settings.batch, *(("-m", settings.model) if settings.model else ())]
    whole, killed = folder / "whole.jsonl", folder / "killed.jsonl"
    start = start_seconds(command, job, folder)
    undisturbed = _finish(command, job, whole, folder)
    say(f"undisturbed: {undisturbed:.1f} s for {settings.rows} rows, start {start:.1f} s")
    lives = run_with_kills(settings, command, job, killed, start)
    say(f"killed {len(lives)} times at {[life['rows'] for life in lives]} rows")
    last = _finish(command, job, killed, folder)
    counts = [0, *(int(life["rows"]) for life in lives)]
    spent = sum(life["seconds"] for life in lives) + last
    return {
        "rows": settings.rows,
        "kills": len(lives),
        "kills_while_starting": sum(before == after for before, after in itertools.pairwise(counts)),
        "start_seconds": start,
        "undisturbed_seconds": undisturbed,
        "disturbed_seconds": spent,
        "lost_seconds_per_kill": (spent - undisturbed) / max(1, len(lives)),
        "lives": lives,
        **compare(whole, killed, settings.rows),
    }


def make_job(folder: Path, rows: int, seed: int) -> Path:
    """Write pictures and the JSONL file that asks about each; returns its path."""
    pictures = folder / "pictures"
    pictures.mkdir()
    lines = []
    for number in range(rows):
        (pictures / f"{number:06d}.png").write_bytes(picture(seed, number))
        lines.append(json.dumps({"id": f"row-{number}", "image": f"pictures/{number:06d}.png", "question": question(number)}))
    (folder / "job.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "job.jsonl"


def start_seconds(command: Sequence[str], job: Path, folder: Path) -> float:
    """How long a job of one row takes."""
    one = job.with_name("one.jsonl")
    one.write_text(job.read_text().split("\n", 1)[0] + "\n")
    return _finish(command, one, folder / "one-out.jsonl", folder)


def run_with_kills(settings: Settings, command: Sequence[str], job: Path, out: Path, start: float) -> list[Part]:
    """Kill the job again and again: some lives end while it starts, most a moment after a row that is drawn evenly.

    Returns:
        For each life its `seconds`, and `rows`, the lines in the output when it had ended.
    """
    rng = random.Random(settings.seed)
    lives: list[Part] = []
    rows = 0
    for left in range(settings.kills, 0, -1):
        remaining = settings.rows - rows
        # of each life's fair share none to twice as much; never so much that nothing is left to kill
        wanted = rows + min(rng.uniform(0, 2 * remaining / (left + 1)), 0.7 * remaining)
        moment = rng.uniform(0, start) if rng.random() < STARTING else None
        began = time.perf_counter()
        with (out.parent / "killed.log").open("ab") as log:
            process = subprocess.Popen([*command, str(job), str(out)], stdout=log, stderr=log)
        try:
            if moment is None:
                _wait_for_lines(process, out, math.ceil(wanted))
                process.wait(rng.uniform(0, A_MOMENT))
            else:
                process.wait(moment)
            break  # faster than thought: the job is done
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        rows = out.read_bytes().count(b"\n") if out.exists() else 0
        lives.append({"seconds": time.perf_counter() - began, "rows": rows})
    return lives


def _wait_for_lines(process: subprocess.Popen[bytes], out: Path, wanted: int) -> None:
    """Return when the output has so many lines, or the process has ended."""
    size = lines = 0
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError), out.open("rb") as file:
            file.seek(size)
            added = file.read()
            size, lines = size + len(added), lines + added.count(b"\n")
        if lines >= wanted:
            return
        time.sleep(0.001)


def compare(whole: Path, killed: Path, rows: int) -> Part:
    """Count rows that are missing and rows that are there twice, and say whether the files are the same bytes."""
    found = Counter(_ids(killed))
    wanted = {f"row-{number}" for number in range(rows)}
    return {
        "missing": len(wanted - set(found)),
        "twice": sum(count - 1 for count in found.values()),
        "unknown": len(set(found) - wanted),
        "identical": whole.read_bytes() == killed.read_bytes(),
    }


def _ids(path: Path) -> list[str]:
    ids = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            ids.append(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError):
            ids.append(f"not a row: {line[:80]}")
    return ids


def _finish(command: Sequence[str], job: Path, out: Path, folder: Path) -> float:
    """Run to the end; returns seconds."""
    start = time.perf_counter()
    log = folder / f"{out.stem}.log"
    with log.open("ab") as file:
        done = subprocess.run([*command, str(job), str(out)], stdout=file, stderr=file, check=False)
    if done.returncode != 0:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise PgfastError(
            f"the batch command ended with code {done.returncode}: {said[-1][:300] if said else 'it printed nothing'}"
        )
    return time.perf_counter() - start
