"""`docs/reliability.md`: figures of fuzzing, damaged bundles and the soak, from one result file, between two marks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pgfast.errors import InputError

from .result_file import read_result_file

COMMAND, VERSION = "make soak", 1
BEGIN = "<!-- figures: made by `python -m pgfast.bench.reliability`, do not edit -->"
END = "<!-- end of figures -->"
MOST_SLOPE = 200.0
"""Bytes of resident memory per answer, after the first quarter: 4 MB in 20,000 answers; the allocator alone wavers by 100."""


def write_part(path: Path, name: str, figures: dict[str, Any], machine: dict[str, Any]) -> None:
    """Put the figures of one run into a result file; the other parts stay.

    Args:
        path: The result file, which may not exist yet.
        name: Of the part.
        figures: What `markdown` shows.
        machine: What `describe` returned before the run: the commit is the one that ran, not the one at its end.
    """
    parts = read(path)["parts"] if path.exists() else {}
    parts[name] = figures | {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {key: machine[key] for key in ("processor", "cores", "python", "versions", "commit")},
    }
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps({"format": VERSION, "parts": dict(sorted(parts.items()))}, indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        InputError: It is none.
    """
    return read_result_file(path, COMMAND, VERSION)


def markdown(name: str, data: dict[str, Any]) -> str:
    """Return the figures as Markdown.

    Args:
        name: Of the result file.
        data: Its content.
    """
    parts = data["parts"]
    lines = ["| fuzz target | seconds | executions | edges of code (corpus / run) | findings |", "|---|---|---|---|---|"]
    for part, f in parts.items():
        if part.startswith("fuzz "):
            edges = f"{f['edges_of_corpus']} / {f['edges']}"
            lines.append(f"| {part[5:]} | {f['seconds']} | {f['executions']:,} | {edges} | {f['findings']} |")
    if "bundles" in parts:
        lines += ["", *_bundles(parts["bundles"])]
    if "soak" in parts:
        lines += ["", *_soak(parts["soak"])]
    lines += ["", f"From `{name}`:", ""]
    for part, f in parts.items():
        m = f["machine"]
        lines.append(f"- {part}: {m['processor']}, {m['cores']} cores, {f['date']}, commit {m['commit']}")
    return "\n".join(lines) + "\n"


def _bundles(f: dict[str, Any]) -> list[str]:
    kinds = list(f["kinds"])
    lines = [f"| {f['count']:,} damaged bundles | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for mutation, counts in f["mutations"].items():
        lines.append(f"| {mutation.replace('_', ' ')} | {' | '.join(str(counts.get(kind, 0)) for kind in kinds)} |")
    lines.append(f"| all | {' | '.join(str(count) for count in f['kinds'].values())} |")
    lines += ["", f"Processes that died or hung: {f['died']}. {f['seconds']:.0f} seconds."]
    return lines


def _soak(f: dict[str, Any]) -> list[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in f["kinds"].items())
    flat = "flat" if f["slope"] <= MOST_SLOPE else "**not flat**"
    return [
        f"Soak: {f['answers']:,} answers ({kinds}) from {f['threads']} threads in {f['seconds']:.0f} seconds; "
        f"{f['wrong']} wrong. "
        f"Resident memory {f['first'] / 1e6:.1f} MB after the first quarter, {f['last'] / 1e6:.1f} MB at the end, at most "
        f"{f['peak'] / 1e6:.1f} MB: {f['slope']:+.1f} bytes per answer (promised: at most {MOST_SLOPE:.0f}): {flat}. "
        f"Threads {f['more_threads']:+d}, open files {f['more_files']:+d}."
    ]


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


def main(path: Path, document: Path) -> None:
    """Put the figures of a result file into a document."""
    document.write_text(put_into(document.read_text(encoding="utf-8"), markdown(str(path), read(path))), encoding="utf-8")


if __name__ == "__main__":
    import sys

    main(*map(Path, sys.argv[1:3]))
