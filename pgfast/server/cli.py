"""`pgfast serve`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import math
import sys
from pathlib import Path
from typing import Any

import click

from pgfast.cli.logs import OneLine
from pgfast.errors import InputError, MissingDependencyError
from pgfast.scale.cluster import Cluster, ray_options

MIB = 2**20
M_MMAP_THRESHOLD = -3
"""As glibc's malloc.h has it; set once, the threshold no longer rises."""
SWITCH = 0.0005
"""Seconds after which a Python thread lets others in; 5 ms by default: so long the engine would wait for the event loop."""


def _limits(command: Any) -> Any:
    """Add one option per limit; what is not given stays `ServerConfig`'s default."""
    for option in (
        click.option("--drain-timeout", type=float, metavar="SECONDS", help="For requests in flight when it stops [30]."),
        click.option("--cache-pictures", type=float, metavar="MB", help="Encoded pictures to keep; 0: none [256]."),
        click.option("--decoders", type=int, help="Pictures decoded at a time [one per core, at most 4]."),
        click.option("--max-pixels", type=int, help="Largest picture [50000000]."),
        click.option("--max-body-mb", type=float, metavar="MB", help="Largest request [20]."),
        click.option("--timeout", type=float, metavar="SECONDS", help="For a whole request [60]."),
        click.option("--max-queue", type=int, help="Requests that may wait; more get status 429 [256]."),
    ):
        command = option(command)
    return command


def _doors(command: Any) -> Any:
    """Add who may ask, from where."""
    for option in (
        click.option(
            "--allow-url-host", multiple=True, metavar="HOST[:PORT]", help="Fetch pictures from this host; repeatable."
        ),
        click.option("--cors-origin", multiple=True, metavar="ORIGIN", help="Site whose pages may ask; repeatable."),
        click.option("--api-key-file", type=click.Path(path_type=Path), help="Keys, one per line: only who has one may ask."),
        click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."),
        click.option("--host", default="127.0.0.1", show_default=True, help="Interface; 0.0.0.0: all of them."),
    ):
        command = option(command)
    return command


@click.command()
@click.option("-m", "--model", metavar="BUNDLE", envvar="PGFAST_MODEL", help="Bundle folder [env: PGFAST_MODEL].")
@click.option("--provider", default="auto", show_default=True, help="auto, cpu, cuda, tensorrt or tensorrt-rtx.")
@click.option("--threads", type=int, help="CPU threads; by default one per core.")
@_doors
@_limits
@ray_options
def serve(model: str | None, provider: str, threads: int | None, host: str, port: int, **given: Any) -> None:
    """Answer questions over HTTP: a web page, a JSON API and an OpenAI-compatible one."""
    for module in ("starlette", "uvicorn", "httptools", "prometheus_client", "pydantic", "python_multipart"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingDependencyError(module, "serve") from error
    from pgfast.cli.options import load_engine

    from .serving import Server, bind, url_of

    cluster = Cluster.of(given, model, provider, threads)
    config = _config(given)
    if cluster is not None:
        from pgfast.scale import serving

        where = f"http://{host}:{port} of every node with an engine"
        serving.run(cluster, config, host, port, lambda count: _say(f"serving on {where}, {count} engines"))
        return
    sys.setswitchinterval(SWITCH)
    _give_memory_back()
    with bind(host, port) as sock, load_engine(model, provider, threads, spin=False) as engine:
        _log_to_stderr()

        def on_ready() -> None:
            gc.collect()
            gc.freeze()  # a million objects of libraries, that later collections need not look at
            _say(f"serving on {url_of(sock)}")

        Server(engine, config, on_ready).run([sock])


def _say(text: str) -> None:
    print(f"pgfast: {text}", file=sys.stderr, flush=True)


def _give_memory_back() -> None:
    """Let large blocks return to the system when they are freed; glibc would keep ever larger ones for itself."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**22)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s pgfast %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("pgfast.server.remote_pictures").setLevel(logging.INFO)  # why a URL was refused: clients are not told
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the client is told


def _config(given: dict[str, Any]) -> Any:
    from .access import read_keys
    from .config import ServerConfig

    values = {name: value for name, value in given.items() if value is not None}
    values["cors_origins"] = values.pop("cors_origin")
    values["allow_url_hosts"] = values.pop("allow_url_host")
    if "api_key_file" in values:
        values["api_keys"] = read_keys(values.pop("api_key_file"))
    for name in ("max_body_mb", "cache_pictures"):
        if not math.isfinite(values.get(name, 0)):
            raise InputError(f"--{name.replace('_', '-')} is {values[name]}: a number of MB is needed")
    if "max_body_mb" in values:
        values["max_body"] = int(values.pop("max_body_mb") * MIB)
        values["max_bodies"] = max(ServerConfig.max_bodies, 4 * values["max_body"])
    if "cache_pictures" in values:
        values["cache_pictures"] = int(values["cache_pictures"] * MIB)
    return ServerConfig(**values)
