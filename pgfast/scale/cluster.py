"""Connecting to Ray, how many engines fit, and the options of `pgfast batch` and `pgfast serve` that say it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from pgfast.errors import ClusterError, MissingDependencyError

F = TypeVar("F", bound=Callable[..., Any])
HERE = "auto"
"""Address of the cluster that this machine belongs to, or else of a Ray that is started for one command."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where engines run, and what they are."""

    address: str
    """host:port, or `HERE`."""
    engines: int | None
    """How many; None: as many as fit."""
    engine_cpus: int
    """Cores that each reserves."""
    bundle: str | None
    """Folder, at this path on every node; None: the demo model."""
    provider: str
    threads: int | None
    """CPU threads of each; None: one per core that it reserves."""

    @classmethod
    def of(cls, values: dict[str, Any], model: str | None, provider: str, threads: int | None) -> Cluster | None:
        """Take what `ray_options` added out of a command's arguments; None without --ray.

        Raises:
            BundleError: The bundle is damaged or incomplete.
        """
        address, engines, engine_cpus = values.pop("ray"), values.pop("engines"), values.pop("engine_cpus")
        if address is None:
            if engines is not None:
                raise click.UsageError("--engines goes with --ray")
            return None
        from pgfast.bundle import Bundle
        from pgfast.loading import demo_bundle

        Bundle.open(Path(model) if model else demo_bundle())  # here, where its error is one line
        return cls(address, engines, engine_cpus, model and os.path.abspath(model), provider, threads)


@dataclass(frozen=True, slots=True)
class Placement:
    """How many engines, and what each of them reserves."""

    engines: int
    num_cpus: int
    num_gpus: int


def ray_options(command: F) -> F:
    """Add --ray, --engines and --engine-cpus; `Cluster.of` takes them."""
    for option in (
        click.option(
            "--engine-cpus", type=click.IntRange(1), default=2, show_default=True, help="Cores per engine, with --ray."
        ),
        click.option("--engines", type=click.IntRange(1), help="With --ray; by default as many as fit, one per GPU."),
        click.option(
            "--ray",
            is_flag=False,
            flag_value=HERE,
            metavar="[ADDRESS]",
            help="Run on the Ray cluster at ADDRESS; without one (--ray at the end of the line) on this machine.",
        ),
    ):
        command = option(command)
    return command


@contextmanager
def connected(cluster: Cluster) -> Iterator[Placement]:
    """Connect this process to a cluster for a while; `HERE` starts a Ray on this machine where there is none.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: Nobody answers at the address, or not a single engine fits.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use to its makers unless told not to
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors come as exceptions too; one line is no error at all
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError("ray", "scale") from error
    _check(cluster.address)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces every start and end
    try:
        address = None if cluster.address == HERE else cluster.address
        ray.init(address, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"no Ray cluster at {cluster.address}: {one_line(error)}") from error
    try:
        yield place(cluster)
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Make sure that somebody listens: Ray itself would try for many minutes."""
    if address in (HERE, "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"{address!r} is no address of a Ray cluster: give host:port, and --ray behind IN and OUT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}; 'ray start --head' begins one") from error


def place(cluster: Cluster) -> Placement:
    """Decide what fits: one engine per GPU, or per `engine_cpus` cores where no GPU is wanted or there is none.

    Raises:
        ClusterError: Not a single engine fits.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    gpu = cluster.provider != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
    fit = 0
    for node in nodes:
        cores = int(node.get("CPU", 0)) // cluster.engine_cpus
        fit += min(cores, int(node.get("GPU", 0))) if gpu else cores
    if not fit:
        most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise ClusterError(f"no engine fits: the largest node has {most} cores; give fewer with --engine-cpus")
    return Placement(cluster.engines or fit, cluster.engine_cpus, int(gpu))


def one_line(error: BaseException) -> str:
    """What an error of Ray says in its first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
