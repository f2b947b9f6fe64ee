"""Mutants in a child process, which is started anew when it dies: who killed it is known."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHILD = Path(__file__).with_name("mutant_child.py")
SECONDS = 60
"""The longest that a bundle may take to an answer or an error."""


@dataclass(frozen=True)
class Outcome:
    """What came of one bundle."""

    seed: int
    mutation: str
    kind: str
    """Name of the error, `answer`, `died` or `hung`."""
    message: str
    expected: bool
    """An answer, or an error of pgfast's own."""


class Child:
    """A process that opens bundles."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by __exit__
        self._start()

    def _start(self) -> None:
        self._process: Any = subprocess.Popen(
            [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process.stdout, self._lines), daemon=True).start()

    @staticmethod
    def _read(stream: Any, lines: queue.SimpleQueue[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put("")  # the end

    def open(self, folder: Path) -> dict[str, str]:
        """Return what became of a bundle; `died` and `hung` are kinds like the names of errors."""
        self._errors.seek(0)
        self._errors.truncate()
        self._process.stdin.write(json.dumps(str(folder)) + "\n")
        self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=SECONDS)
        except queue.Empty:
            self._end()
            self._start()
            return {"kind": "hung", "message": f"no answer within {SECONDS} seconds", "pgfast": "False"}
        if line:
            return dict(json.loads(line))
        code = self._process.wait()
        self._errors.seek(0)
        told = self._errors.read()[-2000:]
        self._end()
        self._start()
        return {"kind": "died", "message": f"exit code {code}: {told}", "pgfast": "False"}

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        self._errors.close()


def run_mutants(make: Callable[[Path, int], str], seeds: Iterable[int], scratch: Path) -> list[Outcome]:
    """Make a bundle for each seed, open it in a child, and remove it."""
    found = []
    with Child() as child:
        for seed in seeds:
            folder = scratch / f"mutant-{seed}" / "bundle"
            folder.parent.mkdir()
            mutation = make(folder, seed)
            result = child.open(folder)
            shutil.rmtree(folder.parent)
            found.append(Outcome(seed, mutation, result["kind"], result["message"], result["pgfast"] == "True"))
    return found


def table(outcomes: Iterable[Outcome]) -> str:
    """How often which kind of damage ended how."""
    counts = Counter((each.mutation, each.kind) for each in outcomes)
    return "\n".join(f"{mutation:20} {kind:20} {count}" for (mutation, kind), count in sorted(counts.items()))


def counted(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of docs/reliability.md: how often which end came, in all and of each kind of damage."""
    kinds = Counter(each.kind for each in outcomes)
    mutations: dict[str, Counter[str]] = {}
    for each in outcomes:
        mutations.setdefault(each.mutation, Counter())[each.kind] += 1
    return {
        "count": len(outcomes),
        "kinds": dict(kinds.most_common()),
        "mutations": {mutation: dict(mutations[mutation]) for mutation in sorted(mutations)},
        "died": kinds["died"] + kinds["hung"],
    }
