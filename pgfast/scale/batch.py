"""`pgfast batch --ray`: its rows through engines in actors of Ray Data, results back in order."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pgfast.batch.answering import answer_rows
from pgfast.batch.rows import Result, Row
from pgfast.types import GenerateOptions

from .processor import PgfastProcessorConfig, map_engines

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset


class RowsWorker:
    """An actor that does with its rows what `pgfast batch` does in one process.

    Args:
        bundle: Folder on this node; None: the demo model.
        provider: As in `pgfast.load`.
        threads: CPU threads of the engine.
        options: How to decode.
    """

    def __init__(self, *, bundle: str | None, provider: str, threads: int, options: GenerateOptions | None) -> None:
        import pgfast

        self._engine, self._options = pgfast.load(bundle, provider=provider, threads=threads), options

    def __call__(self, table: pa.Table) -> dict[str, list[bytes]]:
        """Answer pickled rows (column `row`) with pickled results (column `result`)."""
        rows = [pickle.loads(row) for row in table["row"].to_pylist()]
        return {"result": [pickle.dumps(result) for result in answer_rows(self._engine, rows, options=self._options)]}


def answer_rows_on_cluster(
    rows: Iterable[Row], config: PgfastProcessorConfig, *, options: GenerateOptions | None = None
) -> Iterator[Result]:
    """Answer rows like `answer_rows`, on the cluster that this process is connected to; results come in the rows' order.

    All rows are read before the first is answered: they wait in Ray's object store, which goes to disk when it is full.
    An actor that dies is replaced, and its batches are answered by another.

    Args:
        rows: Their pictures' paths must mean the same on every node.
        config: The bundle and the engines; `batch_size` rows are one task.
        options: How to decode.
    """
    import ray

    blocks: list[Any] = [ray.put(block) for block in _blocks(rows, config.batch_size)]
    if not blocks:
        return
    dataset = map_engines(_in_order(ray.data.from_arrow_refs(blocks)), RowsWorker, config, options=options)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for result in batch["result"]:
            yield pickle.loads(result.as_py())


def _blocks(rows: Iterable[Row], size: int) -> Iterator[pa.Table]:
    import pyarrow as pa

    rest = iter(rows)
    while part := list(itertools.islice(rest, size)):
        yield pa.table({"row": pa.array([pickle.dumps(_anywhere(row)) for row in part], pa.binary())})


def _anywhere(row: Row) -> Row:
    """The row with a path that does not depend on where this process was started."""
    return row if row.embedded or not row.picture else dataclasses.replace(row, picture=os.path.abspath(row.picture))


def _in_order(dataset: Dataset) -> Any:
    context = dataset.context  # the dataset's own copy
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False  # `pgfast batch` draws one
    return dataset
