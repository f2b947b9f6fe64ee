"""Rubbish for the server, and what it holds and says afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from .client import closed_loop
from .fuzz import http_shots, json_shots, picture_shots
from .fuzz.schema_cases import SchemaRun, run_schema
from .fuzz.shot import HANGING, Outcome, fire
from .load import answer_text
from .process import Server, Usage, watching
from .questions import PATH, json_body, picture, question, request
from .settings import Settings

KINDS = http_shots.KINDS | json_shots.KINDS | picture_shots.KINDS
AT_ONCE = 8
"""Connections: enough to overlap, too few to be refused as too many."""
WARM_SHARE = 0.2
"""Of the requests, sent beforehand with other seeds: allocators and caches have their size then."""
SCHEMA_SHARE = 0.3
"""Of the requests, made by schemathesis."""
Part = dict[str, Any]


def measure_malformed(settings: Settings, server: Server, wanted: str, say: Callable[[str], None]) -> Part:
    """Send a first part as warm-up, then all, and compare what the server holds before and after.

    Args:
        settings: How many.
        server: Started; nobody else uses it.
        wanted: The engine's answer to question 0.
        say: Called with a line of progress.
    """
    count = settings.requests
    few = [request(settings.seed + 1, number) for number in range(settings.clients)]
    closed_loop(server.address, few, settings.clients, settings.warmup)  # pools of threads have their size then
    warm = _send_all(server, round(count * WARM_SHARE), settings.seed + 1, say)
    first = server.settled()
    with watching(lambda: server.usage().memory, 0.25) as memory:
        half = _send_all(server, count // 2, settings.seed + 2, say)
        middle = server.settled()
        rest = _send_all(server, count - count // 2, settings.seed + 3, say)
        last = server.settled()
    outcomes, complaints = half.outcomes + rest.outcomes, half.complaints + rest.complaints
    return {
        "requests": len(outcomes),
        "warm_up": len(warm.outcomes),
        "answered_in_between": warm.answered and half.answered and rest.answered,
        "alive": server.alive,
        "right_afterwards": _answer(server, settings.seed) == wanted,
        **describe_outcomes(outcomes),
        "schema_complaints": dict(sorted(complaints.items())),
        "schema_examples": half.examples | rest.examples,
        "usage": {name: _usage(usage) for name, usage in (("before", first), ("middle", middle), ("after", last))},
        "memory_peak": max(size for _, size in memory),
        "growth_per_request": (last.memory - first.memory) / max(1, len(outcomes)),
        "log_lines": server.trouble()[:20],
        "log_trouble": len(server.trouble()),
    }


def describe_outcomes(outcomes: Sequence[Outcome]) -> Part:
    """Count by status and by kind; `server_errors` are statuses of 500 and above without 503, which says "later"."""
    kinds: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        found = kinds.setdefault(outcome.kind, {})
        found[outcome.result] = found.get(outcome.result, 0) + 1
    server_errors = [o for o in outcomes if o.result.isdigit() and int(o.result) >= 500 and o.result != "503"]
    return {
        "statuses": dict(sorted(Counter(o.result for o in outcomes).items())),
        "kinds": {kind: dict(sorted(found.items())) for kind, found in sorted(kinds.items())},
        "server_errors": len(server_errors),
        "server_error_bodies": sorted({f"{o.kind}: {o.result} {o.body[:300].decode(errors='replace')}" for o in server_errors})[
            :20
        ],
        "hung": sum(o.result == HANGING for o in outcomes),
        "p99_seconds": float(np.percentile([o.seconds for o in outcomes], 99)) if outcomes else None,
    }


def _send_all(server: Server, count: int, seed: int, say: Callable[[str], None]) -> SchemaRun:
    """Send raw shots, then schemathesis' requests; the result holds the outcomes of both."""
    raw = count - round(count * SCHEMA_SHARE)
    outcomes = asyncio.run(shoot(server, raw, seed))
    say(f"{raw} raw requests: {dict(sorted(Counter(o.result for o in outcomes).items()))}")
    answered = server.status("/healthz") == 200
    schema = run_schema(server.address, count - raw, seed)
    say(f"{len(schema.outcomes)} requests of the schema: {dict(sorted(Counter(o.result for o in schema.outcomes).items()))}")
    schema.outcomes[:0] = outcomes
    schema.answered = answered and server.status("/healthz") == 200
    return schema


async def shoot(server: Server, count: int, seed: int) -> list[Outcome]:
    """Send so many raw shots, a few at once; all kinds take turns."""
    outcomes: list[Outcome] = []
    numbers = iter(range(count))
    names = list(KINDS)

    async def run() -> None:
        for number in numbers:
            kind = names[number % len(names)]
            outcomes.append(await fire(server.address, kind, KINDS[kind](Random(f"{seed}/{number}"))))

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(run())
    return outcomes


def _answer(server: Server, seed: int) -> str | None:
    status, body = server.call("POST", PATH, json_body(picture(seed, 0), question(0)))
    return answer_text(body) if status == 200 else None


def _usage(usage: Usage) -> Part:
    return {"memory": usage.memory, "files": usage.files, "threads": usage.threads}
