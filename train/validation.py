"""Greedy answers and their VQA accuracy while a run goes."""

from __future__ import annotations

import logging
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pgfast.errors import ImageError, TrainError
from pgfast.image import normalize

from .answer_model import batch_tensors, greedy
from .data.records import RowError
from .distributed import Processes
from .evaluation.scores import Score, score
from .pictures import Pictures, broken_picture
from .plan import Plan, Progress
from .sequence import Example, collate

logger = logging.getLogger(__name__)


class Validation:
    """The evaluation data of a run.

    Args:
        plan: The run; it has evaluation data.
        special: Keyword arguments of `collate`.
        processes: Who shares the work.
        sharded: All processes hold parts of one model: each answers every question, so that they keep step.
    """

    def __init__(self, plan: Plan, special: dict[str, int], processes: Processes, *, sharded: bool) -> None:
        assert plan.evaluation is not None
        self._config, self._encoder, self._tokenizer = plan.config, plan.encoder, plan.base.tokenizer
        self._dataset, self._all_rows = plan.evaluation.dataset, plan.evaluation.rows
        self._special, self._processes, self._eos_id = special, processes, plan.base.config.eos_token_id
        self._pictures = Pictures(self._dataset, plan.base.image)
        self._rows = self._all_rows if sharded else self._all_rows[processes.rank :: processes.world]
        self._shared = processes.world > 1 and not sharded

    def run(self, model: nn.Module, on_progress: Progress) -> tuple[float, Score]:
        """Answer every question.

        Returns:
            (loss per answer token, score).

        Raises:
            TrainError: A picture is broken inside (with `skip_bad`: all are).
        """
        was_training = model.training
        model.eval()
        answers: list[tuple[int, str]] = []
        loss, done = torch.zeros(2, dtype=torch.float64), 0  # sum, tokens
        with torch.inference_mode(), ThreadPoolExecutor(self._config.workers) as pool:
            for group in self._groups():
                done += len(group)
                pictures = self._open(group, pool)
                rows = [row for row in group if self._dataset.record(row).picture in pictures]
                if not rows:
                    continue
                hidden, image_index = self._hidden(model, rows, pictures)
                loss += self._loss(model, rows, hidden, image_index)
                prompts = [self._encoder.prompt(self._dataset.record(row)) for row in rows]
                of_row = hidden[torch.from_numpy(image_index).to(hidden.device)]
                most = self._config.max_new_tokens
                ids = greedy(model, of_row, prompts, eos_id=self._eos_id, max_new_tokens=most)
                answers += [(row, self._tokenizer.decode(i).strip()) for row, i in zip(rows, ids, strict=True)]
                on_progress("evaluating", done, len(self._rows), "")
        model.train(was_training)
        if self._shared:
            answers, loss = self._processes.gather(answers), self._processes.sum(loss)
        if not answers:
            raise TrainError(f"{self._dataset.name}: no picture of the evaluation data can be read")
        in_order = sorted(answers)
        return float(loss[0] / loss[1].clamp(min=1)), score((self._dataset.record(row), text) for row, text in in_order)

    def _groups(self) -> list[list[int]]:
        """Batches of equal prompt length, so that nothing is padded; neighbours in the data often share a picture."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for row in map(int, self._rows):
            by_length[len(self._encoder.prompt(self._dataset.record(row)))].append(row)
        size = self._config.eval_batch_size
        return [rows[at : at + size] for rows in by_length.values() for at in range(0, len(rows), size)]

    def _open(self, rows: list[int], pool: ThreadPoolExecutor) -> dict[str, NDArray[np.uint8]]:
        """Return the pictures [R, R, 3] of rows by name; with `skip_bad` those that are broken inside are left out."""
        row_of = {self._dataset.record(row).picture: row for row in rows}
        return {
            name: picture
            for name, picture in zip(row_of, pool.map(self._squashed, row_of.values()), strict=True)
            if picture is not None
        }

    def _squashed(self, row: int) -> NDArray[np.uint8] | None:
        try:
            return self._pictures.squashed(row)
        except ImageError as error:
            if not self._config.skip_bad:
                raise TrainError(broken_picture(self._dataset, row, error)) from error
            logger.warning("row %d of %s is not evaluated: %s", row, self._dataset.name, error)
            return None

    def _hidden(
        self, model: nn.Module, rows: list[int], pictures: dict[str, NDArray[np.uint8]]
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Return the tower's output [I, P, W] and the picture of each row, [B]."""
        names = [self._dataset.record(row).picture for row in rows]
        number = {name: i for i, name in enumerate(pictures)}
        stacked = np.stack(list(pictures.values()))  # [I, R, R, 3]
        pixels = torch.from_numpy(normalize(stacked, self._pictures.spec)).to(self._processes.device)
        nothing = torch.empty(0, dtype=torch.long, device=self._processes.device)
        hidden: torch.Tensor = model(nothing, nothing, nothing, pixel_values=pixels, only_vision=True)
        return hidden, np.array([number[name] for name in names])

    def _loss(self, model: nn.Module, rows: list[int], hidden: torch.Tensor, image_index: np.ndarray) -> torch.Tensor:
        """Return (sum over the answer tokens, their number) of the rows whose answer can be encoded."""
        examples: dict[int, Example] = {}
        for at, row in enumerate(rows):
            try:
                examples[at] = self._encoder(self._dataset.record(row))
            except RowError:  # an answer that training would refuse is still one to compare with
                continue
        if not examples:
            return torch.zeros(2, dtype=torch.float64)
        batch = collate(list(examples.values()), **self._special)
        tensors = batch_tensors(batch, image_index[list(examples)], hidden.device)
        losses = model(**tensors, image_hidden=hidden)
        return torch.tensor([float(losses.double().sum()), losses.numel()], dtype=torch.float64)
