"""What one optimizer step is fed: rows drawn, encoded, their pictures prepared; made ahead in a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pgfast.errors import ImageError, TrainError
from pgfast.image import normalize

from .config import TrainConfig
from .data.records import Dataset
from .encoding import Encoder
from .feature_cache import FeatureCache
from .order import RowOrder, answer_of
from .pictures import Augment, Pictures, broken_picture
from .sequence import IGNORE, Batch, Example, collate, loss_weights

logger = logging.getLogger(__name__)

AUGMENT = 4
"""First word of the seeds of augmentation (`order.py` has the others)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one forward and backward pass."""

    rows: NDArray[np.int64]
    """[B]"""
    batch: Batch
    weights: NDArray[np.float32]
    """[A], what each answer position counts; over a whole step they add up to 1."""
    image_index: NDArray[np.int64]
    """[B], number of each row's picture among the pictures of this pass."""
    pixel_values: NDArray[np.float32] | None
    """[N, 3, R, R] of the pictures without cached features, in their order; None if there are none."""
    features: dict[int, torch.Tensor]
    """Cached features [P, W] by picture number."""
    names: tuple[str, ...]
    """Name of each picture in the feature cache; empty where it is not to be kept."""


def encode_rows(
    encoder: Encoder, dataset: Dataset, rows: NDArray[np.int64], epochs: NDArray[np.int64], seed: int
) -> list[Example]:
    """Return the examples of rows [G], each with the answer that its epoch [G] teaches."""
    examples = []
    for row, epoch in zip(rows.tolist(), epochs.tolist(), strict=True):
        record = dataset.record(row)
        answers = encoder.taught(record)
        examples.append(encoder(record, answer_of(answers, epoch, row, seed) if len(answers) > 1 else answers[0]))
    return examples


class BatchMaker:
    """Makes the passes of a step for one of several processes.

    Args:
        config: The run.
        dataset: Training data.
        order: Which rows.
        encoder: Records to ids.
        pictures: Pictures by row.
        special: Keyword arguments of `collate`: image_token_id, num_image_tokens, pad_token_id.
        cache: Features of the frozen tower.
        augment: Changes to pictures.
        rank: Number of this process.
        world: Number of processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        order: RowOrder,
        encoder: Encoder,
        pictures: Pictures,
        special: dict[str, int],
        *,
        cache: FeatureCache | None = None,
        augment: Augment | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._config, self._dataset, self._order = config, dataset, order
        self._encoder, self._pictures, self._spec, self._special = encoder, pictures, pictures.spec, special
        self._cache, self._augment, self._rank, self._world = cache, augment, rank, world
        self._pool = ThreadPoolExecutor(config.workers)
        self._ahead = ThreadPoolExecutor(1)
        self.unreadable: dict[int, str] = {}
        """Rows whose picture turned out to be broken inside, and why (with `skip_bad`)."""

    def steps(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        """Yield the passes of steps `first` to `last - 1`, made one step ahead."""
        pending = self._ahead.submit(self.make, first) if first < last else None
        for step in range(first, last):
            assert pending is not None
            passes = pending.result()
            pending = self._ahead.submit(self.make, step + 1) if step + 1 < last else None
            yield passes

    def close(self) -> None:
        """End the threads."""
        self._ahead.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def make(self, step: int) -> list[MicroBatch]:
        """Make this process's passes of a step."""
        c = self._config
        rows, epochs = self._order.draw(step)
        # every process encodes all texts: they are cheap, and the loss is a mean over the whole step
        examples = encode_rows(self._encoder, self._dataset, rows, epochs, c.seed)
        total = sum(len(example.suffix) for example in examples) if c.loss_reduction == "token" else len(examples)
        mine = np.arange(len(rows)).reshape(c.accumulation, self._world, c.batch_size)[:, self._rank]
        return [
            self._micro_batch(rows[part], [examples[i] for i in part], total, [AUGMENT, c.seed, step, self._rank, number])
            for number, part in enumerate(mine)
        ]

    def _micro_batch(self, rows: NDArray[np.int64], examples: list[Example], total: float, seed: list[int]) -> MicroBatch:
        batch = collate(examples, **self._special)
        shown = [self._dataset.record(int(row)).picture for row in rows]
        number = {name: i for i, name in enumerate(dict.fromkeys(shown))}
        image_index = np.array([number[name] for name in shown])  # [B]
        of_picture = [int(rows[shown.index(name)]) for name in number]  # [I], a row that shows each picture
        names = list(self._pool.map(self._name, of_picture))
        features = {i: hidden for i, hidden in enumerate(self._pool.map(self._load, names)) if hidden is not None}
        missing = [i for i in range(len(of_picture)) if i not in features]
        pixels, broken = self._pixels([of_picture[i] for i in missing], seed)
        weights = loss_weights(batch, self._config.loss_reduction, total)
        if broken:
            positions = np.nonzero(batch.labels != IGNORE)[0]  # [A], the row of each answer position
            weights[np.isin(image_index[positions], [missing[i] for i in broken])] = 0
            names = ["" if i in {missing[b] for b in broken} else name for i, name in enumerate(names)]
        return MicroBatch(rows, batch, weights, image_index, pixels, features, tuple(names))

    def _pixels(self, rows: Sequence[int], seed: list[int]) -> tuple[NDArray[np.float32] | None, list[int]]:
        """Return pixel_values [N, 3, R, R] of the pictures of N rows, and which of them are broken (black, then)."""
        if not rows:
            return None, []
        opened = list(self._pool.map(self._squashed, rows))
        broken = [i for i, picture in enumerate(opened) if picture is None]
        size = self._spec.size
        black = np.zeros((size, size, 3), np.uint8)
        pictures = np.stack([black if picture is None else picture for picture in opened])  # [N, R, R, 3]
        if self._augment is not None:
            names = [self._dataset.record(row).picture for row in rows]
            pictures = self._augment(pictures, names, np.random.default_rng(seed))
        return normalize(pictures, self._spec), broken

    def _squashed(self, row: int) -> NDArray[np.uint8] | None:
        try:
            return self._pictures.squashed(row)
        except ImageError as error:
            if not self._config.skip_bad:
                raise TrainError(broken_picture(self._dataset, row, error)) from error
            if row not in self.unreadable:
                self.unreadable[row] = str(error)
                logger.warning("row %d is left out: %s", row, error)
            return None

    def _name(self, row: int) -> str:
        if self._cache is None:
            return ""
        try:
            return self._cache.name_of(self._dataset.image(row))
        except OSError:
            return ""  # opening the picture will say why

    def _load(self, name: str) -> torch.Tensor | None:
        return self._cache.load(name) if self._cache is not None and name else None
