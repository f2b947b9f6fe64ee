"""A result file as Markdown and as one HTML page with its pictures inside."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

from . import plots, summary
from .performance import accuracy_lines
from .result_file import read_result_file
from .run import FORMAT
from .summary import METRICS, Data
from .workloads import WORKLOADS


@dataclass(slots=True)
class Section:
    """A heading with what stands under it."""

    title: str
    lines: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    picture: str | None = None


def read_results(path: Path) -> Data:
    """Read a result file (raises as `read_result_file`)."""
    return read_result_file(path, "pgfast bench run", FORMAT)


def write_report(results: Path, out: Path) -> list[Path]:
    """Write report.md, its pictures and report.html; returns their paths.

    Args:
        results: The result file.
        out: An existing folder.

    Raises:
        InputError: It is not a result file.
        MissingDependencyError: matplotlib is not installed.
    """
    data = read_results(results)
    pictures, content = plots.draw(data), sections(data)
    files = {**pictures, "report.md": markdown(content, pictures), "report.html": page(content, pictures)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def sections(data: Data) -> list[Section]:
    """What the report says, in order."""
    parts = [_machine(data), Section("Accuracy of these bundles", accuracy_lines(data))]
    parts += [_workload(data, name) for name in data["settings"]["workloads"]]
    batches = [WORKLOADS[name].title for name in data["settings"]["workloads"] if name.startswith("batch")]
    for part in parts:
        part.picture = {WORKLOADS["short"].title: "latency.svg", **dict.fromkeys(batches[-1:], "batch.svg")}.get(part.title)
    parts += [_starts(data), _roofline(data), _functions(data)]
    skipped = [f"{s['contender']}{', ' + s['workload'] if s['workload'] else ''}: {s['reason']}" for s in data["skipped"]]
    parts.append(Section("Skipped", skipped or ["nothing"]))
    return [part for part in parts if part.lines or part.rows]


def _machine(data: Data) -> Section:
    m, s, limits = data["machine"], data["settings"], summary.ceilings(data)
    units = {
        "read_bytes": "GB/s read",
        "copy_bytes": "GB/s copied",
        "fp32_flops": "GFLOP/s fp32",
        "fp16_flops": "GFLOP/s fp16",
        "int8_flops": "GOP/s int8",
    }
    lines = [
        f"{m['processor']}, {m['cores']} cores ({', '.join(m['flags']) or 'no flags known'}), "
        f"{(m['memory_bytes'] or 0) / 2**30:.0f} GiB{', ' + m['gpu'] if m['gpu'] else ''}, {m['system']}",
        f"{s['threads']} threads for every contender, provider {s['provider']}, {s['rounds']} counted rounds, "
        f"at most {s['budget']:.0f} s per workload and group",
        ", ".join(f"{name} {version}" for name, version in m["versions"].items()) + f", Python {m['python']}",
        f"{data['date']}, commit {m['commit']}",
        "ceilings: " + ", ".join(f"{limits[key] / 1e9:.1f} {unit}" for key, unit in units.items() if key in limits),
        "groups that took turns: " + "; ".join(" + ".join(group) for group in data["groups"]),
    ]
    return Section("Machine", lines)


def _workload(data: Data, name: str) -> Section:
    ours = [entry["name"] for entry in data["contenders"] if entry["ours"]]
    columns = ["ttft", "per_token", "next_question", "answers_per_second", "tokens_per_second"]
    found = [entry["name"] for entry in data["contenders"] if summary.samples(data, entry["name"], name)]
    columns = [key for key in columns if any(summary.values(data, contender, name, key) for contender in found)]
    header = ["", "n", "p50", "p90", "p99", *(METRICS[key].title for key in columns), "tokens"]
    rows = []
    for contender in found:
        totals = summary.values(data, contender, name, "total")
        lengths = "/".join(map(str, sorted(summary.lengths(data, contender, name))))
        warm = "" if not summary.samples(data, contender, name)[0]["warmup"] else " (first run)"
        row = [contender, f"{len(totals)}{warm}", *map(seconds, summary.percentiles(totals))]
        row += [_cell(summary.median(summary.values(data, contender, name, key)), METRICS[key].unit) for key in columns]
        rows.append([*row, lengths])
    lines = [f"prompt of {data['model']['positions'][name]} positions; medians where nothing else is said"] if rows else []
    for contender in ours:
        for peer in (entry["name"] for entry in data["contenders"] if not entry["ours"]):
            said = [
                f"{METRICS[key].title} {value:.2f}x"
                for key in ("total", "ttft", "per_token")
                if (value := summary.ratio(data, contender, peer, name, key)) is not None
            ]
            if said:
                lines.append(f"{contender} against {peer}, times as fast: {', '.join(said)}")
    return Section(WORKLOADS[name].title, lines, header, rows)


def _starts(data: Data) -> Section:
    header = [
        "",
        "n",
        "cold start",
        "load",
        "load to first answer",
        "peak memory",
        "of it file-backed at the end",
        "device memory",
    ]
    rows = []
    for entry in data["contenders"]:
        name = entry["name"]
        if not (cold := summary.starts(data, name, "cold")):
            continue
        times = [_cell(summary.median(summary.starts(data, name, key)), "s") for key in ("cold", "load", "first_answer")]
        memory = [_cell(summary.peak_memory(data, name, key), "B") for key in ("peak", "file_backed", "device")]
        rows.append([name, str(len(cold)), *times, *memory])
    lines = ["medians of fresh processes, started alone with their files in the page cache; a short answer is the first"]
    return Section("Start and memory", lines if rows else [], header, rows)


def _roofline(data: Data) -> Section:
    header = ["", "", "measured", "floor", "roofline ratio", "GFLOP/s", "GB/s"]
    rows = []
    for roof in summary.rooflines(data, summary.longest(data)):
        rates = [f"{roof.flops / roof.seconds / 1e9:.1f}", f"{roof.bytes / roof.seconds / 1e9:.1f}"]
        rows.append([roof.contender, roof.phase, seconds(roof.seconds), seconds(roof.floor), f"{roof.share:.0%}", *rates])
    lines = [
        "the floor is the larger of arithmetic over the matmul ceiling (int8 and int4 against int8, all else against fp32; "
        "on a GPU all but fp32 against fp16) and memory traffic over the better of reading and copying"
    ]
    return Section("Roofline", lines if rows else [], header, rows, "roofline.svg")


def _functions(data: Data) -> Section:
    """The same function? Against the most exact peer that ran."""
    names = list(data["probes"])
    wanted = next(
        (name for name in ("transformers fp32", "onnx fp32", "openvino fp32", "transformers bf16") if name in names), None
    )
    if wanted is None:
        return Section("The same function")
    reference = data["probes"][wanted]
    rows = []
    for name in names:
        probe = data["probes"][name]
        same = sum(a == b for a, b in zip(probe["tokens"], reference["tokens"], strict=False))
        difference = abs(probe["first_logprob"] - reference["first_logprob"])
        rows.append([name, f"{same} of {len(reference['tokens'])}", f"{difference:.2g}"])
    header = ["", f"greedy tokens equal to {wanted}'s", "first token's log-probability differs by"]
    return Section(
        "The same function",
        ["one picture and prompt; other precisions may flip near-ties, which random weights have many of"],
        header,
        rows,
    )


def seconds(value: float) -> str:
    """Seconds for people."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s":
        return seconds(value)
    return f"{value / 1e9:.2f} GB" if unit == "B" else f"{value:.2f}"


def markdown(content: list[Section], pictures: dict[str, str]) -> str:
    """The report for people who read text; pictures are files beside it."""
    lines = ["# pgfast bench", ""]
    for part in content:
        lines += [f"## {part.title}", "", *(f"- {line}" for line in part.lines), ""]
        if part.rows:
            lines += [f"| {' | '.join(part.header)} |", "|" + "---|" * len(part.header)]
            lines += [f"| {' | '.join(row)} |" for row in part.rows]
            lines.append("")
        if part.picture in pictures:
            lines += [f"![{part.title}]({part.picture})", ""]
    return "\n".join(lines)


STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
)


def page(content: list[Section], pictures: dict[str, str]) -> str:
    """The report as one HTML page that needs no other file."""
    lines = ["<!doctype html>", '<html lang="en"><meta charset="utf-8"><title>pgfast bench</title>', f"<style>{STYLE}</style>"]
    lines.append("<h1>pgfast bench</h1>")
    for part in content:
        lines.append(f"<h2>{html.escape(part.title)}</h2>")
        lines.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in part.lines) + "</ul>")
        if part.rows:
            lines.append(f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in part.header)}</tr>")
            lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in part.rows]
            lines.append("</table>")
        if part.picture in pictures:
            lines.append(pictures[part.picture or ""])
    return "\n".join(lines) + "\n</html>\n"
