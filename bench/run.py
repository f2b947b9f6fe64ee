"""The whole benchmark: starts, then groups of contenders interleaved over the workloads; everything into one JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pgfast.bundle import Bundle
from pgfast.errors import InputError

from . import machine
from .client import Worker, WorkerError
from .contenders import Spec
from .grouping import groups
from .participants import Entry, choose
from .settings import Settings
from .workloads import WORKLOADS, Requests, Workload

FORMAT = 1
PROBE_TOKENS = 4
Say = Callable[[str], None]


def measure(settings: Settings, out: Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Measure and write `out`, anew after every step, so that an interrupted run keeps what it has.

    Args:
        settings: What to measure.
        out: The JSON file.
        say: Called with a line of progress.

    Returns:
        The content of the file.

    Raises:
        InputError: There is nothing to measure.
        BundleError: A bundle cannot be used.
    """
    return _Run(settings, out, say).whole()


class _Run:
    """State of one run: the growing result, and where it is written."""

    def __init__(self, settings: Settings, out: Path, say: Say) -> None:
        if unknown := set(settings.workloads) - set(WORKLOADS):
            raise InputError(f"unknown workload {min(unknown)!r}: choose from {', '.join(WORKLOADS)}")
        if not settings.bundles:
            raise InputError("no bundle to measure: give at least one with --bundle")
        self._settings, self._out, self._say = settings, out, say
        bundles = [Bundle.open(folder) for folder in settings.bundles]
        self._entries, skipped = choose(settings, bundles)
        self._requests = Requests(bundles[0])
        self._data: dict[str, Any] = {
            "format": FORMAT,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine.describe(),
            "settings": {
                name: getattr(settings, name) for name in ("rounds", "starts", "budget", "threads", "provider", "workloads")
            },
            "model": _describe_model(settings, bundles[0], self._requests),
            "contenders": [entry.describe() for entry in self._entries],
            "skipped": skipped,
            "ceilings": [],
            "starts": [],
            "probes": {},
            "groups": [],
            "samples": [],
        }
        for line in skipped:
            say(f"{line['contender']}: skipped, {line['reason']}")

    def whole(self) -> dict[str, Any]:
        self._ceilings()
        for number in range(self._settings.starts):
            for entry in list(self._entries):
                self._start(entry, number)
        self._groups()
        self._ceilings()
        return self._data

    def _groups(self) -> None:
        """Form groups that fit into memory and run them one after the other."""
        limit = machine.available_memory()
        sizes = {entry.spec.name: float(entry.memory) for entry in self._entries}
        ours = [entry.spec.name for entry in self._entries if entry.spec.ours]
        peers = [entry.spec.name for entry in self._entries if not entry.spec.ours]
        names = groups(ours, peers, sizes, limit)
        self._data["groups"] = names
        for lost in set(sizes) - {name for group in names for name in group}:
            self._skip(lost, f"needs about {sizes[lost] / 1e9:.1f} GB, {limit / 1e9:.1f} GB are free")
        for number, group in enumerate(names):
            self._group(number, [entry.spec for entry in self._entries if entry.spec.name in group])

    def _write(self) -> None:
        partial = self._out.with_name(f".{self._out.name}.partial")
        partial.write_text(json.dumps(self._data, indent=1) + "\n")
        partial.replace(self._out)

    def _skip(self, contender: str, reason: str, workload: str | None = None) -> None:
        self._data["skipped"].append({"contender": contender, "workload": workload, "reason": reason})
        self._say(f"{contender}{f', {workload}' if workload else ''}: skipped, {reason}")
        self._write()

    def _ceilings(self) -> None:
        self._say("the machine's own ceilings")
        self._data["ceilings"].append(machine.ceilings(self._settings.threads, self._settings.provider))
        self._write()

    def _start(self, entry: Entry, number: int) -> None:
        """Start a fresh process alone, with its files in the page cache, ask one question, and see how much memory it took."""
        name = entry.spec.name
        spent = sum(start["cold"] for start in self._data["starts"] if start["contender"] == name)
        if spent > self._settings.budget / 3:  # one is enough of something that slow
            return
        if number == 0 and entry.memory > (free := machine.available_memory()):
            self._entries.remove(entry)
            self._skip(name, f"needs about {entry.memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            return
        entry.read_files()
        short = WORKLOADS["short"]
        try:
            with Worker(entry.spec, self._settings.timeout) as worker:
                first = worker.ask(do="answer", request=self._requests.message(short, number))
                cold = time.perf_counter() - worker.started
                memory = _memory(first, worker, self._settings.provider)
                if number == 0:
                    probe = dataclasses.replace(short, new_tokens=PROBE_TOKENS)
                    self._data["probes"][name] = worker.ask(do="probe", request=self._requests.message(probe, 0))
        except WorkerError as error:
            self._entries.remove(entry)
            self._skip(name, str(error))
            return
        load = worker.load_seconds
        self._data["starts"].append(
            {"contender": name, "cold": cold, "load": load, "first_answer": load + first["total"], "memory": memory}
        )
        entry.observe(memory.get("anonymous"))
        self._say(f"{name}: start {number + 1}, first answer {cold:.2f} s after the spawn")
        self._write()

    def _group(self, number: int, specs: Sequence[Spec]) -> None:
        """Load the contenders of a group together and take turns."""
        self._say(f"group {number + 1}: {', '.join(spec.name for spec in specs)}")
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for spec in specs:
                try:
                    workers[spec.name] = stack.enter_context(Worker(spec, self._settings.timeout))
                except WorkerError as error:
                    self._skip(spec.name, str(error))
            for name in self._settings.workloads:
                workload = WORKLOADS[name]
                if reason := self._requests.refuse(workload):
                    self._skip("all", reason, name)
                    continue
                self._rounds(number, workload, workers)
                self._write()

    def _rounds(self, group: int, workload: Workload, workers: dict[str, Worker]) -> None:
        begun = time.monotonic()
        taking_part = [name for name in workers if not self._too_slow(group, workload, name)]
        if self._nothing_new(workload, taking_part):
            return
        for number in range(self._settings.rounds + 1):
            round_begun = time.monotonic()
            request = self._requests.message(workload, number)
            for name in [name for name in taking_part if name in workers]:
                try:
                    reply = workers[name].ask(do="answer", request=request)
                except WorkerError as error:
                    del workers[name]
                    self._skip(name, str(error), workload.name)
                    continue
                place = {"group": group, "workload": workload.name, "round": number, "contender": name}
                memory = _memory(reply, workers.get(name), self._settings.provider)
                self._data["samples"].append(place | {"warmup": number == 0} | reply | {"memory": memory})
                self._say(f"{workload.name}, round {number}: {name} {reply['total']:.3f} s")
            now = time.monotonic()
            if now + (now - round_begun) > begun + self._settings.budget:
                return

    def _nothing_new(self, workload: Workload, names: Sequence[str]) -> bool:
        """Whether only pgfast would run, as it did in an earlier group: there is no peer to compare it with."""
        measured = {s["contender"] for s in self._data["samples"] if s["workload"] == workload.name}
        ours = {entry.spec.name for entry in self._entries if entry.spec.ours}
        return set(names) <= ours & measured

    def _too_slow(self, group: int, workload: Workload, name: str) -> bool:
        """Whether one sample would take more than a third of the budget, judged by the shortest workload."""
        known = [s for s in self._data["samples"] if (s["group"], s["contender"], s["workload"]) == (group, name, "short")]
        if not known or workload.name == "short":
            return False
        short = known[-1]
        steps = max(1, len(short["tokens"][0]) - 1)
        step = (short["total"] - short["ttft"]) / steps
        expected = workload.questions * (workload.batch * short["ttft"] + (workload.new_tokens - 1) * step)
        if expected <= self._settings.budget / 3:
            return False
        self._skip(name, f"one sample would take about {expected:.0f} s (budget {self._settings.budget:.0f} s)", workload.name)
        return True


def _memory(reply: dict[str, Any], worker: Worker | None, provider: str) -> dict[str, Any]:
    memory: dict[str, Any] = reply["memory"]
    if memory["device"] is None and provider != "cpu" and worker is not None:
        memory["device"] = machine.device_memory(worker.pid)
    return memory


def _describe_model(settings: Settings, bundle: Bundle, requests: Requests) -> dict[str, Any]:
    config = None
    if settings.checkpoint is not None:
        from pgfast.export.config import read_config

        config = dataclasses.asdict(read_config(settings.checkpoint / "config.json"))
    m = bundle.manifest
    return {
        "family": m.family,
        "image_size": m.image.size,
        "positions": {name: requests.positions(WORKLOADS[name]) for name in settings.workloads},
        "config": config,
    }
