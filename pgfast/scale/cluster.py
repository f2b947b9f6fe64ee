"""Connecting to Ray, how many engines fit, and the options of `pgfast batch` and `pgfast serve` that say it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from pgfast.errors import MissingDependencyError, PgfastError

F = TypeVar("F", bound=Callable[..., Any])
HERE = "auto"
"""Address of the cluster that this machine belongs to, or else of a Ray that is started for the command alone."""


class ClusterError(PgfastError, RuntimeError):
    """There is no such cluster, or no room in it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How many engines, and what each of them reserves."""

    engines: int
    num_cpus: int
    num_gpus: int


def ray_options(command: F) -> F:
    """Add --ray, --engines and --engine-cpus."""
    for option in (
        click.option(
            "--engine-cpus", type=click.IntRange(1), default=2, show_default=True, help="Cores of each engine on Ray."
        ),
        click.option("--engines", type=click.IntRange(1), help="Engines on Ray; by default as many as fit, one per GPU."),
        click.option(
            "--ray",
            is_flag=False,
            flag_value=HERE,
            metavar="[ADDRESS]",
            help="Run on the Ray cluster at ADDRESS (host:port); without it on this machine's. Put it last, or write --ray=.",
        ),
    ):
        command = option(command)
    return command


def connect(address: str) -> None:
    """Connect this process to a cluster; `HERE` starts a Ray on this machine where there is none.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: Nobody answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use to its makers unless told not to
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("ray", "scale") from error
    try:
        ray.init(address=None if address == HERE else address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        line = str(error).strip().split("\n", 1)[0]
        raise ClusterError(f"no Ray cluster at {address}: {line}; 'ray start' begins one, --ray alone runs here") from error


def place(engines: int | None, engine_cpus: int, provider: str) -> Placement:
    """Decide what fits the cluster: one engine per GPU, or per `engine_cpus` cores where no GPU is wanted or there is none.

    Args:
        engines: As many; None: as many as fit.
        engine_cpus: Cores of each.
        provider: As in `pgfast.load`; cpu leaves GPUs alone.

    Raises:
        ClusterError: Not a single engine fits.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    gpu = provider != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
    fit = 0
    for node in nodes:
        cores = int(node.get("CPU", 0)) // engine_cpus
        fit += min(cores, int(node.get("GPU", 0))) if gpu else cores
    if not fit:
        most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise ClusterError(f"no engine fits: the largest node has {most} cores; give fewer with --engine-cpus")
    return Placement(fit if engines is None else engines, engine_cpus, int(gpu))
