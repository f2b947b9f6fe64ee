"""64 clients against `answer_batch`, in turns; and the arithmetic on what a client saw."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..summary import median, percentiles
from .baseline import Baseline
from .client import Exchange, Load, closed_loop
from .process import Server
from .questions import request
from .settings import Settings

WARM_QUESTIONS = 256
"""Of `answer_batch`, to see how many it answers in a round."""
SPARE = 1.3
"""Questions made for a round over those that `answer_batch` is expected to answer in it."""
REPEATED = 16
"""Pictures of the round whose pictures come again."""
Part = dict[str, Any]


def measure_load(settings: Settings, server: Server, baseline: Baseline) -> Part:
    """Let `answer_batch` and the clients answer the same new questions, round after round.

    Returns:
        `rounds`, each with `batch` and `served` as `describe` says them, `served` for all rounds together, and `repeated`.
    """
    seconds = settings.seconds / settings.rounds
    baseline.answer(0, WARM_QUESTIONS)
    rate = WARM_QUESTIONS / baseline.answer(0, WARM_QUESTIONS).seconds
    first = WARM_QUESTIONS
    few = [request(settings.seed, number) for number in range(WARM_QUESTIONS)]
    closed_loop(server.address, few, settings.clients, settings.warmup)
    rounds: list[Part] = []
    loads: list[Load] = []
    for _ in range(settings.rounds):
        count = math.ceil(rate * seconds)
        made = math.ceil(count * SPARE)
        requests = [request(settings.seed, number) for number in range(first, first + made)]
        batch = baseline.answer(first, count)
        cpu = server.usage().cpu
        load = closed_loop(server.address, requests, settings.clients, seconds)
        cpu = server.usage().cpu - cpu
        texts = batch.texts
        asked = min(made, 1 + max((e.number for e in load.exchanges), default=0))
        if asked > count:  # the clients came further than answer_batch
            texts = texts + baseline.answer(first + count, asked - count).texts
        batched: Part = {"rate": count / batch.seconds, "cpu_per_answer": batch.cpu / count}
        served = describe([load], cpu) | {"wrong": wrong(load.exchanges, texts, made)}
        rounds.append({"batch": batched, "served": served, "ratio": served["rate"] / batched["rate"]})
        loads.append(load)
        first += made
        rate = count / batch.seconds
    texts = baseline.answer(first, REPEATED).texts
    load = closed_loop(
        server.address, [request(settings.seed, n) for n in range(first, first + REPEATED)], settings.clients, seconds
    )
    together = describe(loads) | {"wrong": sum(r["served"]["wrong"] for r in rounds)}
    return {
        "clients": settings.clients,
        "rounds": rounds,
        "ratio": median([r["ratio"] for r in rounds]),
        "batch_rate": median([r["batch"]["rate"] for r in rounds]),
        "served": together | {"rate": median([r["served"]["rate"] for r in rounds])},
        "repeated": describe([load]) | {"wrong": wrong(load.exchanges, texts, REPEATED), "pictures": REPEATED},
        "server_cpu_per_request": median([r["served"]["server_cpu_per_request"] for r in rounds]),
        "batch_cpu_per_answer": median([r["batch"]["cpu_per_answer"] for r in rounds]),
    }


def describe(loads: Sequence[Load], server_cpu: float | None = None) -> Part:
    """Say what clients saw: answers per second, latencies of answers in seconds, errors, processor time per request."""
    exchanges = [e for load in loads for e in load.exchanges]
    latencies = [e.latency for e in exchanges if e.status == 200]
    part: Part = {
        "requests": len(exchanges),
        "rate": sum(load.rate() for load in loads) / len(loads),
        "errors": sum(e.status != 200 for e in exchanges),
        "statuses": statuses(exchanges),
        "latency": latency(latencies),
        "client_cpu_per_request": sum(load.cpu for load in loads) / max(1, len(exchanges)),
    }
    if server_cpu is not None:
        part["server_cpu_per_request"] = server_cpu / max(1, len(exchanges))
    return part


def latency(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99 and the longest; None of nothing."""
    if not seconds:
        return None
    return dict(zip(("p50", "p90", "p99"), percentiles(list(seconds)), strict=True)) | {"max": max(seconds)}


def statuses(exchanges: Sequence[Exchange]) -> dict[str, int]:
    """How many of each; "0" is a connection that broke."""
    return {str(status): count for status, count in sorted(Counter(e.status for e in exchanges).items())}


def wrong(exchanges: Sequence[Exchange], texts: Sequence[str], made: int) -> int:
    """Count the answers with status 200 that do not say what the engine says.

    Args:
        exchanges: Of requests that were taken around and around.
        texts: The engine's answers, to as many requests as were sent.
        made: Requests that there were.
    """
    return sum(e.status == 200 and answer_text(e.body) != texts[e.number % made] for e in exchanges)


def answer_text(body: bytes) -> str | None:
    """Return the text in a response of `/v1/answer`; None if it is not one."""
    try:
        content = json.loads(body)
    except ValueError:
        return None
    text = content.get("text") if isinstance(content, dict) else None
    return text if isinstance(text, str) else None
