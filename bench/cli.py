"""`pgfast bench`: how long a user waits, against what he would use instead."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click


@click.group()
def bench() -> None:
    """Measure speed; figures are printed, never asserted."""


@bench.command()
@click.option("-m", "--model", metavar="BUNDLE", envvar="PGFAST_MODEL", help="Bundle folder [env: PGFAST_MODEL].")
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True, help="Runs of each whole process.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def startup(model: str | None, runs: int, as_json: bool) -> None:
    """Time `import pgfast`, a whole `pgfast answer`, and a warm `Engine.answer`."""
    from .startup import measure

    report = measure(model, runs)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['machine']}, pgfast {report['pgfast']}, onnxruntime {report['onnxruntime']}, provider {report['provider']}")
    for name, row in report["milliseconds"].items():
        print(f"{name:36} median {row['median']:8.1f} ms   p90 {row['p90']:8.1f} ms   min {row['min']:8.1f} ms   n {row['n']}")


@bench.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def synth(model: str, out: Path, seed: int) -> None:
    """Make a full-size random checkpoint, for example 3b-224 or 2-3b-448, in the new folder OUT."""
    from .synth import synthesize

    synthesize(model, out, seed, lambda done, total: print(f"\r{done}/{total} tensors", end="", file=sys.stderr))
    print(f"\npgfast: wrote {out}", file=sys.stderr)


@bench.command()
@click.argument("bundles", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def accuracy(bundles: tuple[str, ...], as_json: bool) -> None:
    """Answer the easy-VQA test split with each of BUNDLES (by default the embedded one): what a precision costs."""
    from .accuracy import measure

    reports = [measure(bundle) for bundle in (bundles or (None,))]
    if as_json:
        print(json.dumps(reports, indent=2))
        return
    for r in reports:
        print(
            f"{r['bundle']:16} {r['precision']:5} vision {r['vision_precision']:5} {r['megabytes']:8.2f} MB  "
            f"{r['accuracy']:8.3%} of {r['count']}, {r['wrong']} wrong, mean confidence {r['mean_confidence']:.4f}"
        )


@bench.command()
@click.argument("checkpoint", required=False)
@click.option("-b", "--bundle", "bundles", multiple=True, type=click.Path(path_type=Path), help="Bundle; may be repeated.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@click.option("--work", type=click.Path(path_type=Path), default="build/bench", show_default=True, help="For what NAME needs.")
@click.option("--stock", type=click.Path(path_type=Path), help="fp32 export of CHECKPOINT with --layout transformers.js.")
@click.option("--peer", "peers", multiple=True, help="Only these peers [default: all]; 'none' for none.")
@click.option("--workload", "workloads", multiple=True, help="Only these workloads [default: all].")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Counted rounds of each workload.")
@click.option("--starts", type=click.IntRange(1), default=3, show_default=True, help="Fresh processes of each contender.")
@click.option("--budget", type=float, default=300.0, show_default=True, help="Seconds per workload and group.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default="all cores", help="For everybody.")
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda, tensorrt or tensorrt-rtx.")
@click.option("--accuracy", "accuracy_file", type=click.Path(path_type=Path), help="Output of 'bench accuracy --json'.")
def run(checkpoint: str | None, out: Path, work: Path, accuracy_file: Path | None, **words: Any) -> None:
    """Compare bundles with the peers, interleaved; writes results.json and the report into OUT.

    CHECKPOINT is the folder that the bundles were exported from, for the peers. Or it is a name such as 3b-224: then a
    checkpoint of that size with random weights, int8 and int4 bundles and the stock ONNX export are made under --work first
    (25 GB for 3b-224), unless they are there.
    """
    from .participants import PEERS, read_accuracy
    from .prepare import prepare
    from .report import write_report
    from .run import measure
    from .settings import Settings
    from .synth import MODELS

    def say(line: str) -> None:
        print(f"pgfast: {line}", file=sys.stderr)

    given = {name: value for name, value in words.items() if value not in ((), None)}
    folder = Path(checkpoint) if checkpoint else None
    if checkpoint in MODELS and not Path(checkpoint).is_dir():
        folder, *made = prepare(checkpoint, work, ("int8", "int4"), say)
        given = dict(zip(("bundles", "stock"), made, strict=True)) | given
    given["peers"] = () if words["peers"] == ("none",) else words["peers"] or tuple(PEERS)
    settings = Settings(checkpoint=folder, accuracy=read_accuracy(accuracy_file), **given)
    out.mkdir(parents=True, exist_ok=True)
    measure(settings, out / "results.json", say)
    for path in write_report(out / "results.json", out):
        print(path)


@bench.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def report(results: Path, out: Path) -> None:
    """Make the report of RESULTS (results.json of 'bench run') anew in the folder OUT."""
    from .report import write_report

    out.mkdir(parents=True, exist_ok=True)
    for path in write_report(results, out):
        print(path)


@bench.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write [default: print].")
def performance(results: tuple[Path, ...], out: Path | None) -> None:
    """Make the table target / measured / limit from one or more RESULTS."""
    from .performance import performance as table
    from .report import read_results

    text = table([(str(path), read_results(path)) for path in results])
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")


@bench.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--threshold", type=float, default=0.05, show_default=True, help="Worse by this share is a regression.")
def compare(before: Path, after: Path, threshold: float) -> None:
    """Compare two result files; exits with 1 if a row of AFTER is worse than in BEFORE."""
    from .compare import compare as rows_of
    from .compare import differences, missing_rows
    from .report import read_results

    a, b = read_results(before), read_results(after)
    for line in (*differences(a, b), *(f"not measured any more: {row}" for row in missing_rows(a, b))):
        print(f"pgfast: {line}", file=sys.stderr)
    rows = rows_of(a, b)
    for row in rows:
        mark = "WORSE" if row.regressed(threshold) else ""
        print(f"{mark:6}{row.change:6.2f} [{row.low:.2f} {row.high:.2f}]  {row.before:.6g} -> {row.after:.6g}  {row.name}")
    worse = sum(row.regressed(threshold) for row in rows)
    print(f"{worse} of {len(rows)} rows are worse by more than {threshold:.0%}")
    sys.exit(1 if worse else 0)


@bench.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@click.option(
    "--work", type=click.Path(path_type=Path), default="build/bench-training", show_default=True, help="For what is made."
)
@click.option("--model", "models", multiple=True, default=("proportional", "head-heavy"), show_default=True, help="Or tiny.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each variant.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Steps that are not counted.")
@click.option("--steps", "counted", type=click.IntRange(1), default=2, show_default=True, help="Steps that are.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Rows per pass.")
@click.option("--accumulation", type=click.IntRange(1), default=2, show_default=True, help="Passes per step.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default="all cores", help="For everybody.")
def training(out: Path, **words: Any) -> None:
    """Compare a training step with the public recipe (transformers' Trainer), in fp32 on the CPU.

    Writes results.json and report.md into OUT. The models have random weights: "proportional" has the 3B model's shares of
    arithmetic, "head-heavy" is small around the whole vocabulary.
    """
    from .training.report import write_report
    from .training.run import Settings, measure

    out.mkdir(parents=True, exist_ok=True)
    measure(Settings(**words), out / "results.json", lambda line: print(f"pgfast: {line}", file=sys.stderr))
    print(write_report(out / "results.json", out))


@bench.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of serving.json.")
@click.option("--only", metavar="PARTS", help="load, overload, malformed, batch, separated by commas [default: all].")
@click.option("-m", "--model", metavar="BUNDLE", help="Bundle folder [default: the demo model].")
@click.option("--clients", type=click.IntRange(1), default=64, show_default=True, help="Of load.")
@click.option("--seconds", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Of load, and of overload.")
@click.option(
    "--rounds", type=click.IntRange(1), default=4, show_default=True, help="In which load alternates with answer_batch."
)
@click.option("--warmup", type=click.FloatRange(0.1), default=3.0, show_default=True, help="Seconds of load beforehand.")
@click.option("--overload", type=click.FloatRange(1.0), default=3.0, show_default=True, help="Offered rate over capacity.")
@click.option("--requests", type=click.IntRange(1), default=10_000, show_default=True, help="Malformed ones.")
@click.option("--rows", type=click.IntRange(1), default=10_000, show_default=True, help="Of the batch job.")
@click.option("--kills", type=click.IntRange(0), default=20, show_default=True, help="Of the batch job.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--serve-flag", "serve_flags", multiple=True, help="Word for 'pgfast serve'; may be repeated.")
@click.option(
    "--work", type=click.Path(path_type=Path), default="build/bench-serving", show_default=True, help="Pictures, logs, outputs."
)
def serve(out: Path, only: str | None, **words: Any) -> None:
    """Measure `pgfast serve` and `pgfast batch` under load, over capacity, fed with rubbish, and killed.

    Writes serving.json into OUT; parts that are there already and are not measured now are kept. Exits with 1 if a promise of
    docs/serving.md is not kept.
    """
    from .serving.figures import missed
    from .serving.run import measure
    from .serving.settings import Settings

    def say(line: str) -> None:
        print(f"pgfast: {line}", file=sys.stderr)

    if only is not None:
        words["parts"] = tuple(only.split(","))
    settings = Settings(**words)
    out.mkdir(parents=True, exist_ok=True)
    lines = missed(measure(settings, out / "serving.json", say), settings.parts)
    for line in lines:
        print(f"missed: {line}")
    print(out / "serving.json")
    sys.exit(1 if lines else 0)


@bench.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Document whose figures are replaced [default: print].")
def serving(results: Path, out: Path | None) -> None:
    """Make the figures of docs/serving.md from RESULTS (serving.json of 'bench serve')."""
    from .serving import figures
    from .serving.run import read

    if out is None:
        print(figures.markdown(str(results), read(results)), end="")
    else:
        figures.write(str(results), read(results), out)
