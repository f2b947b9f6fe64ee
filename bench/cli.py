"""`pgfast bench`: how long a user waits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
