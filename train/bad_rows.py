"""Files that name the rows a run had trouble with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .batches import MicroBatch
from .plan import Plan


def name_unreadable(plan: Plan, out: Path, rank: int, unreadable: dict[int, str]) -> None:
    """Add rows whose picture turned out to be broken, and why, to a report of the run."""
    if not unreadable:
        return
    with (out / f"unreadable-rows-process-{rank}.jsonl").open("a") as file:
        for row, reason in unreadable.items():
            file.write(json.dumps({"row": row, "id": plan.train.dataset.record(row).id, "reason": reason}) + "\n")


def keep_batch(plan: Plan, path: Path, passes: Sequence[MicroBatch], found: dict[str, object]) -> None:
    """Write the rows of a step as they were trained on.

    Args:
        plan: The run.
        path: The file.
        passes: The step.
        found: What was wrong with it.
    """
    dataset, tokenizer = plan.train.dataset, plan.base.tokenizer
    rows = [
        {
            "row": int(row),
            **{name: value for name, value in asdict(dataset.record(int(row))).items() if name != "answers"},
            "input_ids": ids[: int(length)].tolist(),
            "decoded": tokenizer.decode(ids[micro.batch.num_image_tokens : int(length)].tolist()),
        }
        for micro in passes
        for row, ids, length in zip(micro.rows, micro.batch.input_ids, micro.batch.lengths, strict=True)
    ]
    path.write_text(json.dumps({**found, "rows": rows}, indent=1))
