"""`load()`: a bundle on the best provider that works."""

from __future__ import annotations

import logging
from pathlib import Path

from pgfast.bundle import Bundle
from pgfast.engine import Engine
from pgfast.errors import InputError, ProviderError
from pgfast.runtime.providers import Target, candidates, check_available, engine_cache
from pgfast.runtime.session import out_of_memory

logger = logging.getLogger(__name__)


def demo_bundle() -> Path:
    """Folder of the bundle that ships with the package."""
    return Path(__file__).parent / "demo" / "bundle"


def load(
    bundle: str | Path | None = None,
    *,
    provider: str = "auto",
    threads: int | None = None,
    device_id: int = 0,
    spin: bool = True,
) -> Engine:
    """Load a bundle.

    Args:
        bundle: Its directory; None loads the small demo model inside the package.
        provider: auto, cpu, cuda, tensorrt or tensorrt-rtx. `auto` takes the best one that works.
        threads: CPU threads; None: one per core.
        device_id: Which GPU.
        spin: Let CPU threads wait for each other at full speed: quickest for one question at a time, but the cores are then
            missing where they have other work, as in a server.

    Raises:
        BundleError: The bundle is damaged or incomplete.
        ProviderError: The provider asked for cannot run here; the message names the missing piece.
    """
    opened = Bundle.open(Path(bundle) if bundle is not None else demo_bundle())
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= 1024):
        raise InputError(f"threads is {threads!r}: a whole number from 1 to 1024 is needed")
    manifest = opened.manifest
    failures: list[str] = []
    for name in candidates(provider, manifest.dialect):
        cache = engine_cache(name, opened.folder, manifest.digest())
        halves = {"fp16": manifest.cache_type == "float16", "bf16": manifest.cache_type == "bfloat16"}
        target = Target(name, device_id, **halves, cache_dir=cache, spin=spin)
        try:
            check_available(name)
            engine = Engine(opened, target, threads)
        except (ProviderError, MemoryError) as error:
            failure = error if isinstance(error, ProviderError) else out_of_memory(f"the bundle on {name}", error)
            if provider != "auto":
                raise failure from error
            failures.append(str(failure))
            continue
        logger.info("running on %s", name)
        if name == "tensorrt-rtx" and (stale := manifest.engines_of_other_graphs()):
            files = ", ".join(engine.file for engine in stale)
            # answers are right all the same: onnxruntime compiles the graph itself
            logger.warning("%s: built from another graph than the bundle's; 'pgfast engines' rebuilds", files)
        return engine
    raise ProviderError("no provider works: " + "; ".join(failures))
