"""`pgfast batch --ray`: its rows through engines in actors of Ray Data, results back in order."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pgfast.batch.answering import answer_rows
from pgfast.batch.rows import Result, Row
from pgfast.errors import ClusterError
from pgfast.types import GenerateOptions

from .cluster import Cluster, connected, one_line
from .columns import pack, unpack_result, unpack_row
from .processor import PgfastProcessorConfig, map_engines

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

BATCH = 64
"""Rows of one task: few enough that a kill costs little, enough that a task's own cost does not matter."""


class RowsWorker:
    """An actor that does with its rows what `pgfast batch` does in one process.

    Args:
        bundle: Folder on this node; None: the demo model.
        provider: As in `pgfast.load`.
        threads: CPU threads of the engine.
        folder: What the rows' paths are relative to.
        options: How to decode.
    """

    def __init__(
        self, *, bundle: str | None, provider: str, threads: int, folder: str, options: GenerateOptions | None
    ) -> None:
        import pgfast

        with contextlib.suppress(OSError):  # where it is missing, whole paths may do
            os.chdir(folder)
        self._engine, self._options = pgfast.load(bundle, provider=provider, threads=threads), options

    def __call__(self, table: pa.Table) -> dict[str, list[bytes]]:
        """Answer rows (column `row`) with results (column `result`), both as `pack` writes them."""
        rows = [unpack_row(row) for row in table["row"].to_pylist()]
        return {"result": [pack(result) for result in answer_rows(self._engine, rows, options=self._options)]}


def answer_on_ray(
    rows: Iterable[Row], cluster: Cluster, *, options: GenerateOptions | None = None, batch_size: int = BATCH
) -> Generator[Result]:
    """Answer rows like `answer_rows`, on a cluster; results come in the rows' order.

    All rows are read before the first is answered: they wait in Ray's object store, which goes to disk when it is full.
    An actor that dies is replaced, and its batches are answered by another.

    Args:
        rows: Their pictures' paths must mean the same on every node.
        cluster: Where, and with what engines.
        options: How to decode.
        batch_size: Rows of one task.

    Raises:
        PgfastError: There is no such cluster, or it cannot run the engines.
    """
    with connected(cluster) as placement:
        import ray

        blocks: list[Any] = [ray.put(block) for block in _blocks(rows, batch_size)]
        if not blocks:
            return
        config = PgfastProcessorConfig(
            bundle=cluster.bundle,
            provider=cluster.provider,
            threads=cluster.threads,
            batch_size=batch_size,
            concurrency=min(placement.engines, len(blocks)),
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
        )
        dataset = map_engines(
            _in_order(ray.data.from_arrow_refs(blocks)), RowsWorker, config, folder=os.getcwd(), options=options
        )
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for result in batch["result"]:
                    yield unpack_result(result.as_py())
        except ray.exceptions.RayError as error:
            raise ClusterError(f"the engines on Ray failed: {one_line(error)}") from error


def _blocks(rows: Iterable[Row], size: int) -> Iterator[pa.Table]:
    import pyarrow as pa

    rest = iter(rows)
    while part := list(itertools.islice(rest, size)):
        yield pa.table({"row": pa.array([pack(row) for row in part], pa.binary())})


def _in_order(dataset: Dataset) -> Any:
    context = dataset.context  # the dataset's own copy
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False  # `pgfast batch` draws one
    return dataset
