"""`docs/serving.md`: targets and figures, made from a result file and put between two marks in a text that people write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgfast.errors import InputError

from ..report import seconds
from .details import DETAILS, byte_count, megabytes, plain, times
from .run import Data
from .settings import PARTS

BEGIN = "<!-- figures: made by `pgfast bench serving`, do not edit -->"
END = "<!-- end of figures -->"


@dataclass(frozen=True, slots=True)
class Target:
    """One promise; `path` leads to the figure inside its part."""

    part: str
    what: str
    path: str
    bound: Literal["=", "<=", ">="]
    value: float | bool
    show: Callable[[Any], str]


TARGETS = (
    Target("load", "errors", "served.errors", "=", 0, plain),
    Target("load", "answers that differ from the engine's", "served.wrong", "=", 0, plain),
    Target("load", "answers/s over `answer_batch`'s", "ratio", ">=", 0.85, times),
    Target("load", "p99 over p50", "p99_over_p50", "<=", 5.0, times),
    Target("overload", "slope of resident memory per minute", "memory.slope_per_minute", "<=", 5e6, megabytes),
    Target("overload", "p99 of accepted requests", "accepted.latency.p99", "<=", 2.0, seconds),
    Target("overload", "p99 of accepted, second half over first", "accepted_growth", "<=", 1.5, times),
    Target("overload", "p99 until a refusal (429 or 503)", "refused.latency.p99", "<=", 0.1, seconds),
    Target("overload", "refusals without Retry-After", "refused.without_retry_after", "=", 0, plain),
    Target("overload", "any other outcome", "other", "=", 0, plain),
    Target("overload", "seconds until full speed again", "recovery.seconds", "<=", 2.0, seconds),
    Target("malformed", "malformed requests", "requests", ">=", 10_000, plain),
    Target("malformed", "server errors (500 and above, without 503)", "server_errors", "=", 0, plain),
    Target("malformed", "requests without an answer after 20 s", "hung", "=", 0, plain),
    Target("malformed", "alive, and right afterwards", "well", "=", True, plain),
    Target("malformed", "growth of memory per request", "growth_per_request", "<=", 1024, byte_count),
    Target("malformed", "file descriptors more than before", "more_files", "<=", 0, plain),
    # asyncio's own pool, of six on two cores, may still be growing to its size
    Target("malformed", "threads more than before", "more_threads", "<=", 6, plain),
    Target("malformed", "tracebacks or unhandled errors in the log", "log_trouble", "=", 0, plain),
    Target("batch", "kills", "kills", ">=", 20, plain),
    Target("batch", "rows missing", "missing", "=", 0, plain),
    Target("batch", "rows twice", "twice", "=", 0, plain),
    Target("batch", "output the same bytes as without kills", "identical", "=", True, plain),
)


def derived(part: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a part with those that are reckoned from them."""
    if part == "load":
        took = figures["served"]["latency"]
        return figures | {"p99_over_p50": took["p99"] / took["p50"] if took else None}
    if part == "overload":
        first, second = (figures["accepted"][half] for half in ("first_half", "second_half"))
        return figures | {"accepted_growth": second["p99"] / first["p99"] if first and second else None}
    if part == "malformed":
        before, after = figures["usage"]["before"], figures["usage"]["after"]
        more = {f"more_{name}": after[name] - before[name] for name in ("files", "threads")}
        well = figures["alive"] and figures["answered_in_between"] and figures["right_afterwards"]
        return figures | more | {"well": well}
    return figures


def find(figures: dict[str, Any], path: str) -> Any:
    """Follow a path such as `memory.last`; None where it ends."""
    found: Any = figures
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def met(target: Target, value: Any) -> bool:
    """Whether the promise is kept; what could not be measured keeps none."""
    if value is None:
        return False
    if target.bound == "=":
        return bool(value == target.value)
    return bool(value >= target.value if target.bound == ">=" else value <= target.value)


def missed(data: Data, parts: Sequence[str] = PARTS) -> list[str]:
    """Return a line for each promise that is not kept in the parts that were measured."""
    lines = []
    for target in TARGETS:
        if target.part not in parts or target.part not in data["parts"]:
            continue
        value = find(derived(target.part, data["parts"][target.part]), target.path)
        if not met(target, value):
            said = "not measured" if value is None else target.show(value)
            lines.append(f"{target.part}: {target.what} {said}, promised {target.bound} {target.show(target.value)}")
    return lines


def markdown(name: str, data: Data) -> str:
    """Return the figures as Markdown.

    Args:
        name: Of the result file.
        data: Its content.
    """
    lines = ["| | | target | measured | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        figures = data["parts"].get(target.part)
        wanted = f"{target.bound} {target.show(target.value)}"
        value = None if figures is None else find(derived(target.part, figures), target.path)
        if value is None:
            said = "not measured"
            mark = "" if figures is None else "**missed**"
        else:
            said, mark = target.show(value), "met" if met(target, value) else "**missed**"
        lines.append(f"| {target.part} | {target.what} | {wanted} | {said} | {mark} |")
    for part in PARTS:
        if part in data["parts"]:
            lines += ["", *(f"- {line}" for line in DETAILS[part](derived(part, data["parts"][part])))]
    lines += ["", f"From `{name}`:", ""]
    for part in PARTS:
        if part in data["parts"]:
            p, m = data["parts"][part], data["parts"][part]["machine"]
            lines.append(f"- {part}: {m['processor']}, {m['cores']} cores, {p['date']}, commit {m['commit']}")
    return "\n".join(lines) + "\n"


def put_into(text: str, figures: str) -> str:
    """Return `text` with other figures between its marks.

    Raises:
        InputError: The marks are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise InputError(f"the document has no place for figures: it needs the lines {BEGIN!r} and {END!r} once each")
    return f"{before}{BEGIN}\n{figures}{END}{after}"


def write(name: str, data: Data, document: Path) -> None:
    """Put the figures of a result file into a document.

    Raises:
        InputError: The document has no place for them.
    """
    document.write_text(put_into(document.read_text(encoding="utf-8"), markdown(name, data)), encoding="utf-8")
