"""`pgfast eval`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from pgfast.cli import printable
from pgfast.errors import InputError, PgfastError
from pgfast.manifest import MANIFEST
from pgfast.metrics import Mode
from pgfast.runtime.providers import import_onnxruntime

from ..cli_progress import ProgressBars

if TYPE_CHECKING:
    from ..data.records import Dataset
    from .report import Evaluation

SHOWN = 20
"""Question types that the table has room for; all are in summary.json."""


@click.command()
@click.argument("model", metavar="BUNDLE_OR_CHECKPOINT")
@click.argument("data")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="OUT", help="Write the report into this new folder.")
@click.option("--images", type=click.Path(path_type=Path), metavar="DIR", help="Where the data's pictures are.")
@click.option("--annotations", type=click.Path(path_type=Path), metavar="FILE", help="VQAv2's annotations file.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="PEFT adapter of the checkpoint.")
@click.option("--answer-template", metavar="TEXT", help="Prompt of a question to a checkpoint; {text} is the question.")
@click.option("--language", default="en", show_default=True, help="Language code of the answers.")
@click.option(
    "--mode", type=click.Choice(get_args(Mode)), default="official", show_default=True, help="How answers are scored."
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N questions.")
@click.option("--provider", default="auto", show_default=True, help="As in 'pgfast answer'; a checkpoint: auto, cpu or cuda.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default one per core.")
@click.option("--worst", type=click.IntRange(0), default=100, show_default=True, help="Errors on the page errors.html.")
@click.option("--skip-bad", is_flag=True, help="Count rows that cannot be answered and go on; they score 0.")
@click.option("--calibrate", is_flag=True, help="Fit a temperature to the confidences and store it in the bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def evaluate(
    model: str,
    data: str,
    out: Path | None,
    images: Path | None,
    annotations: Path | None,
    worst: int,
    calibrate: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure the accuracy of a bundle, or of a Hugging Face checkpoint (folder or Hub id), on the questions of DATA."""
    from ..data.sources import open_dataset
    from .calibration import check_writable
    from .report import check_folder, write_report

    if out is not None:
        check_folder(out)
    if calibrate:
        if not is_bundle(model):
            raise InputError(f"{model} is a checkpoint, and a calibration is stored in a bundle: export it first")
        check_writable(Path(model))
    evaluation = _evaluate(model, open_dataset(data, images=images, annotations=annotations), **settings)
    refused = None
    if calibrate:
        try:
            evaluation = _calibrate(Path(model), evaluation)
        except PgfastError as error:  # the answers may have taken hours: what they say comes first
            refused = error
    if out is not None:
        write_report(evaluation, out, worst=worst)
        print(f"pgfast: wrote {out}", file=sys.stderr)
    summary = evaluation.summary()
    print(json.dumps(summary, ensure_ascii=False, indent=2) if as_json else _table(summary))
    if refused is not None:
        raise refused


def _evaluate(
    model: str,
    dataset: Dataset,
    *,
    adapter: Path | None,
    answer_template: str | None,
    language: str,
    mode: Mode,
    limit: int | None,
    provider: str,
    threads: int | None,
    skip_bad: bool,
) -> Evaluation:
    from .answering import answer_with_bundle, answer_with_checkpoint
    from .calibration import report
    from .report import Evaluation
    from .scores import score

    temperature = None
    how: dict[str, Any] = {"limit": limit, "language": language, "skip_bad": skip_bad}
    if is_bundle(model):
        if adapter is not None or answer_template is not None:
            raise InputError(f"{model} is a bundle, which has its adapter and its template inside: leave both options out")
        import pgfast

        with pgfast.load(model, provider=provider, threads=threads) as engine, ProgressBars() as on_progress:
            how["on_progress"] = partial(on_progress, "questions")
            if engine.manifest.calibration is not None:
                temperature = engine.manifest.calibration.temperature
            described, start = _describe_bundle(model, engine), time.perf_counter()
            answers = answer_with_bundle(engine, dataset, **how)
    else:
        from .transformers_model import load_checkpoint

        loaded = load_checkpoint(model, adapter=adapter, answer_template=answer_template, device=provider, threads=threads)
        with ProgressBars() as on_progress:
            how["on_progress"] = partial(on_progress, "questions")
            described, start = loaded.described, time.perf_counter()
            answers = answer_with_checkpoint(loaded, dataset, **how)
    seconds = time.perf_counter() - start
    predicted = ((dataset.record(row), prediction.text) for row, prediction in answers.predictions.items())
    evaluation = Evaluation(dataset, answers, score(predicted, mode), described | _versions(), seconds)
    return dataclasses.replace(evaluation, confidence=report(evaluation.outcomes(), temperature))


def _calibrate(folder: Path, evaluation: Evaluation) -> Evaluation:
    """Fit, store, and report on the half of the pictures that was not fitted to."""
    from .calibration import fit, store

    calibration, found = fit(evaluation.outcomes())
    store(folder, evaluation.model["digest"], calibration)
    print(f"pgfast: the temperature {calibration.temperature:.4g} is in {folder / MANIFEST}", file=sys.stderr)
    if calibration.ece_after >= calibration.ece_before:
        print("pgfast: on the other half it makes the calibration error no smaller: there was little to mend", file=sys.stderr)
    return dataclasses.replace(evaluation, confidence=found)


def is_bundle(model: str) -> bool:
    """Whether a folder is a bundle rather than a checkpoint.

    Raises:
        InputError: It is an adapter without its model.
    """
    folder = Path(model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"{model} is an adapter: give the checkpoint it belongs to, and it with --adapter")
    return (folder / "pgfast.json").is_file()


def _describe_bundle(folder: str, engine: Any) -> dict[str, Any]:
    onnxruntime = import_onnxruntime()

    m = engine.manifest
    return {
        "bundle": Path(folder).resolve().name,
        "digest": m.digest(),
        "checkpoint": m.source.checkpoint,
        "revision": m.source.revision,
        "adapter": m.source.adapter,
        "precision": m.precision,
        "vision_precision": m.vision_precision,
        "template": m.prompts["answer"],
        "provider": engine.provider,
        "onnxruntime": onnxruntime.__version__,
    }


def _versions() -> dict[str, Any]:
    import platform

    import pgfast

    return {"pgfast": pgfast.__version__, "python": platform.python_version()}


def _table(summary: dict[str, Any]) -> str:
    """Accuracy times 100, overall and per type."""
    overall, types = summary["overall"], [*summary["answer_types"].items()]
    questions = [*summary["question_types"].items()]
    lines = [f"accuracy ({summary['mode']}) of {printable(summary['data'])}"]
    rows = [("overall", overall)] if overall else []
    rows += types + questions[:SHOWN]
    width = max((len(printable(name)) for name, _ in rows), default=0)
    lines += [f"{printable(name):{width}}  {100 * part['accuracy']:6.2f}  {part['count']:>9,}" for name, part in rows]
    if len(questions) > SHOWN:
        lines.append(f"and {len(questions) - SHOWN} more question types (--json has all)")
    if summary["unscored"]:
        lines.append(f"{summary['unscored']:,} questions have no reference answer and are not scored")
    if summary["skipped"]:
        lines.append(f"{summary['skipped']:,} rows could not be answered; the first: {_first(summary)}")
    if summary["confidence"] is not None:
        lines += _confidence(summary["confidence"])
    return "\n".join(lines)


def _confidence(found: dict[str, Any]) -> list[str]:
    """Calibration error and reliability table, as it is and with a temperature; times 100."""
    about = f"{found['questions']:,} answers"
    if found["fitted_on"] is not None:
        about += f", none of the {found['fitted_on']:,} that the temperature was fitted to"
    parts = [("", found["plain"])]
    if found["calibrated"] is not None:
        parts.append((f" with temperature {found['temperature']:.4g}", found["calibrated"]))
    lines = []
    for what, part in parts:
        lines += [
            "",
            f"expected calibration error{what}: {100 * part['ece']:.2f} ({about})",
            "confidence     mean  accuracy  answers",
        ]
        for b in part["bins"]:
            span = f"{100 * b['low']:3.0f} to {100 * b['high']:3.0f}"
            lines.append(f"{span}  {100 * b['confidence']:7.2f}  {100 * b['accuracy']:8.2f}  {b['count']:>7,}")
    return lines


def _first(summary: dict[str, Any]) -> str:
    first = summary["skipped_rows"][0]
    return printable(f"row {first['row']}: {first['reason']}")
