"""Three times as many questions as the server can answer, then as many as it can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pgfast.errors import PgfastError

from .client import Exchange, Load, closed_loop, open_loop
from .load import SPARE, describe, latency, statuses
from .process import Server, watching
from .questions import request
from .settings import Settings

REFUSALS = (429, 503)
MOST_QUESTIONS = 20_000
"""Different ones; then the first comes again, long after every cache has forgotten it."""
WINDOW = 0.5
"""Seconds over which the rate after the load is taken."""
FULL = 0.9
"""Share of the rate before that counts as full speed again."""
BEFORE_SECONDS, AFTER_SECONDS = 10.0, 5.0
STEADY, LOADS = 5e5, 30
"""Bytes by which memory may change in the last of the warm-up's loads; at most so many loads."""
Part = dict[str, Any]


def measure_overload(settings: Settings, server: Server) -> Part:
    """Measure the capacity, offer a multiple of it, and measure it again at once."""
    before_seconds = min(BEFORE_SECONDS, settings.seconds / 2)
    after_seconds = min(AFTER_SECONDS, settings.seconds)
    warm = warm_up(settings, server)
    number = math.ceil(SPARE * (warm + 1) * max(before_seconds, after_seconds))
    requests = [request(settings.seed + 2, n) for n in range(2 * number)]
    first, second = requests[:number], requests[number:]
    before = closed_loop(server.address, first, settings.clients, before_seconds)
    capacity = before.rate()
    if not capacity:
        raise PgfastError(f"the server answers nothing under normal load: {server.last_words()}")
    rate = settings.overload * capacity
    requests = [request(settings.seed + 3, n) for n in range(min(MOST_QUESTIONS, math.ceil(rate * settings.seconds)))]
    cpu = server.usage().cpu
    with watching(lambda: server.usage().memory, min(1.0, settings.seconds / 20)) as memory:
        load = open_loop(server.address, requests, rate, settings.seconds, seed=settings.seed)
    cpu = server.usage().cpu - cpu
    after = closed_loop(server.address, second, settings.clients, after_seconds)
    return {
        "capacity": capacity,
        "before": describe([before]),
        "offered_rate": (len(load.exchanges) + load.dropped) / load.seconds,
        **describe_overload(load),
        "memory": describe_memory([sample for sample in memory if sample[0] <= load.start + load.seconds]),
        "server_cpu_seconds": cpu,
        "after": describe([after]),
        "recovery": recovery(load.start + load.seconds, [*load.exchanges, *after.exchanges], capacity, after),
    }


def warm_up(settings: Settings, server: Server) -> float:
    """Ask about new pictures until the server's memory stands still: its cache of pictures is full then.

    Returns:
        Answers per second in the last of the short loads.
    """
    rate, first = 500.0, 0
    for _ in range(LOADS):
        number = math.ceil(SPARE * (rate + 1) * settings.warmup)
        requests = [request(settings.seed + 1, n) for n in range(first, first + number)]
        before = server.usage().memory
        rate, first = closed_loop(server.address, requests, settings.clients, settings.warmup).rate(), first + number
        if abs(server.usage().memory - before) < STEADY:
            break
    return rate


def describe_overload(load: Load) -> Part:
    """Say what became of the requests: accepted, refused, anything else."""
    accepted = [e for e in load.exchanges if e.status == 200]
    refused = [e for e in load.exchanges if e.status in REFUSALS]
    middle = load.start + load.seconds / 2
    halves = [latency([e.latency for e in accepted if (e.due > middle) == later]) for later in (False, True)]
    return {
        "requests": len(load.exchanges),
        "dropped_by_client": load.dropped,
        "statuses": statuses(load.exchanges),
        "accepted": {
            "rate": load.rate(),
            "share": len(accepted) / max(1, len(load.exchanges)),
            "latency": latency([e.latency for e in accepted]),
            "first_half": halves[0],
            "second_half": halves[1],
        },
        "refused": {
            "count": len(refused),
            "latency": latency([e.latency for e in refused]),
            "without_retry_after": sum(b"\r\nretry-after:" not in e.head.lower() for e in refused),
        },
        "other": len(load.exchanges) - len(accepted) - len(refused),
        "client": {
            "late": latency([e.sent - e.due for e in load.exchanges]),
            "cpu_per_request": load.cpu / max(1, len(load.exchanges)),
        },
    }


def describe_memory(samples: Sequence[tuple[float, int]]) -> Part:
    """Say how resident memory went; the slope is a least-squares line without the first quarter, in bytes per minute."""
    kept = samples[len(samples) // 4 :]
    slope = None
    if len(kept) >= 3:
        times = np.array([when for when, _ in kept])
        slope = 60 * float(np.polyfit(times - times[0], [float(size) for _, size in kept], 1)[0])
    sizes = [size for _, size in samples]
    start = samples[0][0] if samples else 0.0
    return {
        "samples": [[round(when - start, 2), size] for when, size in samples],
        "first": sizes[0] if sizes else None,
        "last": sizes[-1] if sizes else None,
        "peak": max(sizes, default=None),
        "slope_per_minute": slope,
    }


def recovery(end: float, exchanges: Sequence[Exchange], capacity: float, after: Load) -> Part:
    """Say when answers came as fast as before.

    Args:
        end: When the last request of the overload was sent.
        exchanges: Of the overload and after it.
        capacity: Answers per second before.
        after: The load that followed.

    Returns:
        `windows`, the rate in each half second after `end` over `capacity`, and `seconds`, the end of the first that reaches
        `FULL`; None if none does.
    """
    ended = np.array([e.ended for e in exchanges if e.status == 200]) - end
    last = max(1, int((after.start + after.seconds - end) / WINDOW))
    shares = [float(((ended > i * WINDOW) & (ended <= (i + 1) * WINDOW)).sum() / WINDOW / capacity) for i in range(last)]
    found = next((i for i, share in enumerate(shares) if share >= FULL), None)
    return {"windows": shares, "seconds": None if found is None else (found + 1) * WINDOW}
