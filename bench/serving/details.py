"""What `docs/serving.md` says about each part beside the table, and how its figures are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..report import seconds


def plain(value: Any) -> str:
    """A count, or yes and no."""
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:,}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x"


def share(value: float) -> str:
    """Per cent."""
    return f"{value:.1%}"


def rate(value: float) -> str:
    """Per second."""
    return f"{value:.0f}/s"


def megabytes(value: float) -> str:
    """Of bytes."""
    return f"{value / 1e6:.1f} MB"


def byte_count(value: float) -> str:
    """Bytes, all digits."""
    return f"{value:,.0f} bytes"


def latency(took: dict[str, float] | None) -> str:
    """Percentiles."""
    return "no answers" if took is None else ", ".join(f"{name} {seconds(took[name])}" for name in ("p50", "p90", "p99", "max"))


def _load(p: dict[str, Any]) -> list[str]:
    s, again, long = p["served"], p["repeated"], p["settings"]["seconds"]
    ratios = ", ".join(f"{r['ratio']:.2f}" for r in p["rounds"])
    cost = [p["batch_cpu_per_answer"], p["server_cpu_per_request"], s["client_cpu_per_request"]]
    batch, server, client = (f"{1000 * value:.2f} ms" for value in cost)
    return [
        f"Load: {p['clients']} clients, each request its own picture, {long:.0f} s in {len(p['rounds'])} rounds "
        f"that alternate with `answer_batch` on the same questions: {s['requests']:,} requests, {rate(s['rate'])} against "
        f"{rate(p['batch_rate'])} (medians); ratios of the rounds {ratios}. Latency: {latency(s['latency'])}.",
        f"Processor time: {batch} per answer of `answer_batch`, {server} per request of the server, {client} per request of "
        "the client, which shares the cores.",
        f"With {again['pictures']} pictures that come again and again: {rate(again['rate'])}, {latency(again['latency'])}, "
        f"{again['wrong']} wrong.",
    ]


def _overload(p: dict[str, Any]) -> list[str]:
    m, a, r, c = p["memory"], p["accepted"], p["refused"], p["client"]
    windows = ", ".join(share(part) for part in p["recovery"]["windows"][:6])
    first, last, peak = (megabytes(m[name]) for name in ("first", "last", "peak"))
    return [
        f"Overload: capacity {rate(p['capacity'])}, offered {rate(p['offered_rate'])} at random moments for "
        f"{p['settings']['seconds']:.0f} s: {p['requests']:,} requests, {share(a['share'])} accepted, {rate(a['rate'])} "
        f"answered ({share(a['rate'] / p['capacity'])} of the capacity). Accepted: {latency(a['latency'])}.",
        f"Refused: {r['count']:,}, {latency(r['latency'])}. The client sent late by {seconds(c['late']['p99'])} at p99 "
        f"(inside all latencies), took {1000 * c['cpu_per_request']:.2f} ms of processor time per request, and had no "
        f"connection left for {p['dropped_by_client']} requests.",
        f"Resident memory, with `{' '.join(p['flags'])}`: {first} at the start, {last} at the end, {peak} at most.",
        f"Rate in the half seconds after the end, over the capacity: {windows}.",
    ]


def _malformed(p: dict[str, Any]) -> list[str]:
    before, middle, after = (p["usage"][when] for when in ("before", "middle", "after"))
    by_status = ", ".join(f"{name} {count:,}" for name, count in p["statuses"].items())
    handles = ", ".join(f"{name} {before[name]} before, {after[name]} after" for name in ("files", "threads"))
    said = "; ".join(f"{what} ({count})" for what, count in p["schema_complaints"].items())
    return [
        f"Malformed: {p['requests']:,} requests of {len(p['kinds'])} kinds after {p['warm_up']:,} others as warm-up. By "
        f'status: {by_status} ("closed": the server closed the connection without a response; "went away": the client did).',
        f"Memory, with `{' '.join(p['flags'])}`: {megabytes(before['memory'])} before, {megabytes(middle['memory'])} in the "
        f"middle, {megabytes(after['memory'])} after, {megabytes(p['memory_peak'])} at most; {handles}.",
        f"Responses that the OpenAPI document does not describe, as schemathesis sees it: {said or 'none'}.",
    ]


def _batch(p: dict[str, Any]) -> list[str]:
    whole, disturbed, lost, start = (
        seconds(p[name]) for name in ("undisturbed_seconds", "disturbed_seconds", "lost_seconds_per_kill", "start_seconds")
    )
    return [
        f"Batch: {p['rows']:,} rows, {p['kills']} kills ({p['kills_while_starting']} before the first new row): {whole} "
        f"undisturbed, {disturbed} with the kills, {lost} lost per kill (a job of one row takes {start}).",
    ]


DETAILS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "load": _load,
    "overload": _overload,
    "malformed": _malformed,
    "batch": _batch,
}
