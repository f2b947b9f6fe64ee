"""What a run writes while it goes: every step as CSV and TensorBoard, every evaluation as JSON lines."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgfast.errors import TrainError

STEP_COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "examples_per_second", "seconds")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation."""

    step: int
    epoch: float
    training_loss: float
    """Mean over the steps since the evaluation before."""
    loss: float
    """Mean over the answer tokens of the evaluation data."""
    accuracy: float
    """VQA accuracy, 0 to 1."""
    by_type: dict[str, float]
    count: int
    seconds: float


class RunLog:
    """The logs of one run; one that continues forgets what it had logged after the state it continues from.

    Args:
        out: The run's folder: `steps.csv`, `evaluations.jsonl`, `tensorboard/`.
        step: Steps done before.
        evaluated: Step of the last evaluation before.
    """

    def __init__(self, out: Path, step: int, evaluated: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._steps, self._evaluations = out / "steps.csv", out / "evaluations.jsonl"
        kept = [row for row in _read_csv(self._steps) if int(row["step"]) <= step]
        self.evaluations = [e for e in read_evaluations(out) if e.step <= evaluated]
        self._since = [float(row["loss"]) for row in kept if int(row["step"]) > evaluated]
        try:
            self._file = self._steps.open("w", newline="")
            self._csv = csv.DictWriter(self._file, STEP_COLUMNS)
            self._csv.writeheader()
            self._csv.writerows(kept)
            self._file.flush()
            self._evaluations.write_text("".join(json.dumps(asdict(e)) + "\n" for e in self.evaluations))
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise TrainError(f"{out} cannot be written: {error.strerror}") from error

    def step(self, row: dict[str, Any]) -> None:
        """Log a step (`STEP_COLUMNS`)."""
        self._csv.writerow(row)
        self._since.append(row["loss"])
        for name in ("loss", "learning_rate", "gradient_norm", "examples_per_second"):
            self._board.add_scalar(f"train/{name}", row[name], row["step"])

    def mean_loss(self) -> float:
        """Mean training loss since the last evaluation."""
        return sum(self._since) / len(self._since) if self._since else math.nan

    def evaluation(self, evaluated: Evaluated) -> None:
        """Log an evaluation."""
        self.evaluations.append(evaluated)
        self._since = []
        with self._evaluations.open("a") as file:
            file.write(json.dumps(asdict(evaluated)) + "\n")
        self._board.add_scalar("evaluation/loss", evaluated.loss, evaluated.step)
        self._board.add_scalar("evaluation/accuracy", evaluated.accuracy, evaluated.step)

    def flush(self) -> None:
        """Put all on disk."""
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        """End the logs."""
        self._file.close()
        self._board.close()


def read_steps(out: Path) -> list[dict[str, float]]:
    """Return the logged steps of a run."""
    return [{name: float(value) for name, value in row.items()} for row in _read_csv(out / "steps.csv")]


def read_evaluations(out: Path) -> list[Evaluated]:
    """Return the evaluations of a run."""
    try:
        lines = (out / "evaluations.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [Evaluated(**json.loads(line)) for line in lines if line.endswith("}")]


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            # a kill may have cut the last line
            return [row for row in csv.DictReader(file) if row.get(STEP_COLUMNS[-1])]
    except FileNotFoundError:
        return []
