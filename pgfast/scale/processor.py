"""Questions of a Ray Dataset through engines in actors, in the shape of `ray.data.llm.build_processor`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pgfast.errors import InputError, MissingDependencyError

from .worker import EngineWorker

if TYPE_CHECKING:
    from ray.data import Dataset

RowFunction = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PgfastProcessorConfig:
    """How the engines are spread over the cluster; one engine per actor.

    Raises:
        InputError: A value is out of its range.
    """

    bundle: str | None = None
    """Bundle folder, at this path on every node; None: the demo model."""
    provider: str = "auto"
    """As in `pgfast.load`."""
    threads: int | None = None
    """CPU threads of an engine; None: `num_cpus`, rounded up."""
    batch_size: int = 64
    """Rows that an actor takes at once, and at most loses when it dies."""
    max_concurrent_batches: int = 2
    """Batches that share an engine, so that its slots stay full where one batch ends and the next begins."""
    concurrency: int | tuple[int, int] = 1
    """Engines; (m, n): from m to n, as the cluster has room."""
    num_cpus: float = 1
    """Cores that an engine reserves."""
    num_gpus: float = 0
    """GPUs that an engine reserves; 0.5 puts two engines on one."""
    accelerator_type: str | None = None
    """Kind of GPU, in Ray's names."""
    should_continue_on_error: bool = False
    """A row that cannot be answered gets a message in `__inference_error__` (empty in the others) instead of ending the job."""
    runtime_env: dict[str, Any] | None = None
    """Ray's runtime environment of the actors."""

    def __post_init__(self) -> None:
        low, high = self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency, self.concurrency)
        if not 1 <= low <= high:
            raise InputError(f"concurrency is {self.concurrency!r}: give the number of engines, or (least, most)")
        if self.batch_size < 1 or self.max_concurrent_batches < 1:
            raise InputError("batch_size and max_concurrent_batches are at least 1")
        if self.num_cpus < 0 or self.num_gpus < 0:
            raise InputError("num_cpus and num_gpus cannot be negative")


@dataclass(frozen=True, slots=True)
class Processor:
    """A function from Dataset to Dataset; nothing runs before the result is read."""

    config: PgfastProcessorConfig
    preprocess: RowFunction | None = None
    postprocess: RowFunction | None = None

    def __call__(self, dataset: Dataset) -> Dataset:
        """Answer every row; the order is the input's where Ray Data's `preserve_order` is set."""
        functions = {"preprocess": self.preprocess, "postprocess": self.postprocess}
        return map_engines(dataset, EngineWorker, self.config, keep_errors=self.config.should_continue_on_error, **functions)


def map_engines(dataset: Dataset, worker: type, config: PgfastProcessorConfig, **extra: Any) -> Dataset:
    """Send a dataset's batches, as Arrow tables, through actors that hold an engine each.

    Args:
        dataset: Its rows.
        worker: Class of the actors, made with `bundle`, `provider`, `threads` and
        extra: further arguments.
        config: How many, of what size.
    """
    from ray.data import ActorPoolStrategy

    c = config
    low, high = c.concurrency if isinstance(c.concurrency, tuple) else (c.concurrency, c.concurrency)
    threads = c.threads or max(1, math.ceil(c.num_cpus))
    return dataset.map_batches(
        worker,
        fn_constructor_kwargs={"bundle": c.bundle, "provider": c.provider, "threads": threads, **extra},
        batch_format="pyarrow",
        batch_size=c.batch_size,
        compute=ActorPoolStrategy(
            min_size=low,
            max_size=high,
            max_concurrent_calls_per_actor=c.max_concurrent_batches,
            enable_true_multi_threading=True,  # an engine takes calls from any number of threads
        ),
        num_cpus=c.num_cpus,
        num_gpus=c.num_gpus,
        accelerator_type=c.accelerator_type,
        runtime_env=c.runtime_env,
        udf_modifying_row_count=False,
    )


def build_processor(
    config: PgfastProcessorConfig, preprocess: RowFunction | None = None, postprocess: RowFunction | None = None
) -> Processor:
    """Build a function that answers the rows of a Ray Dataset.

    Both functions run beside the engine, so pictures that `preprocess` opens never pass through the object store.

    Args:
        config: The bundle, and how many engines of what size.
        preprocess: Makes of a row what is asked: `image` (path, bytes or uint8 array [H, W, 3]), `question` or `prompt`
            (raw, no template around it), and perhaps `choices`, `language` and `options` (`GenerateOptions`, or a dict of
            its fields). Without it the row has these columns.
        postprocess: Makes the result's row of the row, what `preprocess` added and the answer: `text`, `confidence`,
            `finish_reason`, `token_logprobs`, `calibrated`, `unsure_of`, `choice_probabilities` (in the order of
            `choices`). Rows with an error skip it. Without it the result is the row's own columns and the answer's.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("ray", "scale") from error
    return Processor(config, preprocess, postprocess)
