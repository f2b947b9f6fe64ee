"""TensorRT-RTX engines: built ahead of time, without a GPU, and kept in the bundle.

One file per graph and compute capability, for programs that drive TensorRT-RTX themselves. The decoder's engine has two
optimization profiles, 0 for the prompt and 1 for decoding. pgfast itself does not run them: it goes through ONNX Runtime, whose
plugin provider compiles the graphs on its own. `pgfast.load` only warns when an engine belongs to another graph.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgfast.bundle import Bundle, describe_file
from pgfast.errors import ExportError, MissingDependencyError
from pgfast.manifest import MANIFEST, EngineEntry, FileEntry, Manifest, engine_file

from .graphs import MASK_DECODER

logger = logging.getLogger(__name__)

TARGET = "tensorrt-rtx"
CAPABILITIES = ("8.6", "8.9", "12.0")
"""Built when none is named: the GPUs that ONNX Runtime's plugin provider takes (GeForce RTX 30, 40 and 50)."""
BATCHES = (4, 1)
"""Most rows of an engine; the second is for graphs that the builder refuses with the first."""
TYPICAL_PROMPT = 16
"""Prompt tokens that kernels are chosen for: `<bos>`, a prefix, a short question and the newline."""

Sizes = Mapping[str, tuple[int, int, int]]
"""Smallest, typical and largest size of each open dimension."""


def check_options(target: str, capabilities: Sequence[str]) -> tuple[str, ...]:
    """Work out, before anything else is done, which engines an export has to build.

    Args:
        target: What the bundle is for; only tensorrt-rtx has engines.
        capabilities: Compute capabilities asked for, for example 8.9; none: `CAPABILITIES`.

    Raises:
        ExportError: The builder cannot build for one of them, or the target has no engines.
        MissingDependencyError: There is no builder.
    """
    if target != TARGET:
        if capabilities:
            raise ExportError(
                f"target {target} has no engines to build: leave out --compute-capability or take --target {TARGET}"
            )
        return ()
    wanted = tuple(dict.fromkeys(capabilities or CAPABILITIES))
    check_capabilities(wanted)
    return wanted


def import_builder() -> Any:
    """Import TensorRT-RTX's Python package, which holds the builder.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise MissingDependencyError("tensorrt_rtx", "tensorrt-rtx") from error
    return tensorrt_rtx


def builder_version() -> str:
    """Version of the installed builder."""
    return str(import_builder().__version__)


def offered_capabilities() -> dict[str, Any]:
    """What the installed builder can build for: 8.9 and the like, to its own word for it."""
    members = import_builder().ComputeCapability.__members__
    numbers = {int(name[2:]): value for name, value in members.items() if re.fullmatch(r"SM\d+", name)}
    return {f"{number // 10}.{number % 10}": numbers[number] for number in sorted(numbers)}


def check_capabilities(capabilities: Sequence[str]) -> None:
    """Refuse compute capabilities that the installed builder does not know.

    Raises:
        ExportError: The message lists those it knows.
    """
    offered = offered_capabilities()
    for capability in capabilities:
        if capability not in offered:
            known = ", ".join(offered)
            raise ExportError(f"compute capability {capability}: TensorRT-RTX {builder_version()} builds for {known}")


def add_engines(manifest: Manifest, folder: Path, capabilities: Sequence[str]) -> Manifest:
    """Build an engine of every graph for every capability.

    Args:
        manifest: Its graphs and files are in `folder`.
        folder: Where the engines go, too.
        capabilities: As `check_options` returned them.

    Returns:
        The manifest with the engines.

    Raises:
        ExportError: The builder failed.
    """
    wanted = [(graph, capability) for capability in capabilities for graph in sorted(manifest.graphs)]
    return _listed(manifest, [build_engine(manifest, folder, graph, capability, folder) for graph, capability in wanted])


def stale_engines(bundle: Bundle) -> dict[str, str]:
    """Say which engines were built from another graph than the bundle's, or by another builder than the installed one.

    Returns:
        File name to what is wrong with it, for example `was built by 1.6.0`.

    Raises:
        MissingDependencyError: There is no builder.
    """
    version, manifest = builder_version(), bundle.manifest
    stale = {engine.file: f"was built by {engine.builder}" for engine in manifest.engines if engine.builder != version}
    return stale | {engine.file: "was built from another graph" for engine in manifest.engines_of_other_graphs()}


def refresh_engines(folder: Path, capabilities: Sequence[str] = ()) -> list[EngineEntry]:
    """Rebuild the stale engines of a bundle, and build those that it lacks for `capabilities`.

    Everything is built before the bundle is touched, and the bundle can be opened at every moment after that: a stale engine
    leaves the manifest before its file is replaced, and the new one enters it after.

    Returns:
        The engines that were built.

    Raises:
        BundleError: The bundle is damaged.
        ExportError: TensorRT-RTX cannot read the bundle's operators, the builder failed, or the folder cannot be written.
        MissingDependencyError: There is no builder.
    """
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    if manifest.dialect != "standard":
        raise ExportError(f"TensorRT-RTX cannot read the operators of {folder}: export the checkpoint with --target {TARGET}")
    check_capabilities(capabilities)
    stale, present = stale_engines(bundle), {engine.file for engine in manifest.engines}
    wanted = [(engine.graph, engine.compute_capability) for engine in manifest.engines if engine.file in stale]
    graphs = sorted(manifest.graphs.keys() - {MASK_DECODER})  # that one runs on the CPU
    for capability in dict.fromkeys(capabilities):
        wanted += [(graph, capability) for graph in graphs if engine_file(graph, capability) not in present]
    if not wanted:
        return []
    check_capabilities([capability for _, capability in wanted])
    # an engine vouches for the weights it was built from, so the large files are hashed as well
    Bundle.open(folder, full_check=True)
    for file, why in stale.items():
        logger.warning("engine %s %s, rebuilding with %s", file, why, builder_version())
    with _scratch(folder) as scratch:
        built = [build_engine(manifest, folder, graph, capability, scratch) for graph, capability in wanted]
        _put(_without(manifest, {engine.file for engine, _ in built}), scratch, folder)
        for engine, _ in built:
            _sync(scratch / engine.file)
            os.replace(scratch / engine.file, folder / engine.file)
        _put(_listed(manifest, built), scratch, folder)
    return [engine for engine, _ in built]


def build_engine(manifest: Manifest, folder: Path, graph: str, capability: str, out: Path) -> tuple[EngineEntry, FileEntry]:
    """Build one engine.

    Args:
        manifest: The bundle's; its graphs and files need to be complete.
        folder: Where the graphs are.
        graph: vision_encoder or decoder.
        capability: For example 8.9.
        out: Folder to write the engine into.

    Raises:
        ExportError: The builder failed; the message ends with its last word.
    """
    trt, listener = import_builder(), _listener()
    listener.last_error = ""
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    path = folder / manifest.graphs[graph].file
    file = engine_file(graph, capability)
    if not parser.parse_from_file(str(path)):
        raise ExportError(f"TensorRT-RTX cannot read {path.name}: {_reason(parser.get_error(parser.num_errors - 1).desc())}")
    _split_fp32_attention(network)
    logger.info("building %s", file)
    for batch in BATCHES:
        config = configure(builder, capability, profiles_of(manifest, graph, batch))
        engine = builder.build_serialized_network(network, config)
        if engine is not None:
            break
    else:
        raise ExportError(f"TensorRT-RTX cannot build {file}: {_reason(listener.last_error)}")
    (out / file).write_bytes(engine)
    entry = EngineEntry(file, graph, capability, builder_version(), manifest.graph_digest(graph), batch)
    return entry, describe_file(out / file)


def profiles_of(manifest: Manifest, graph: str, batch: int) -> list[dict[str, list[tuple[int, ...]]]]:
    """Return the optimization profiles of a graph: input name to its smallest, typical and largest shape."""
    rows, inputs = (1, 1, batch), manifest.graphs[graph].inputs
    if graph != "decoder":
        return [_shapes(inputs, {"B": rows})]
    p, most = manifest.dimensions.num_image_tokens, manifest.limits.prompt_tokens
    prompt = {"B": rows, "P": (p, p, p), "S": (1, min(TYPICAL_PROMPT, most), most)}
    decode = {"B": rows, "P": (0, 0, 0), "S": (1, 1, 1)}
    return [_shapes(inputs, prompt), _shapes(inputs, decode)]


def configure(builder: Any, capability: str, profiles: Sequence[Mapping[str, Sequence[tuple[int, ...]]]]) -> Any:
    """Return a builder configuration for one compute capability: naming it is what makes a GPU unnecessary."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(offered_capabilities()[capability], 0)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, typical, largest) in shapes.items():
            profile.set_shape(name, smallest, typical, largest)
        config.add_optimization_profile(profile)
    return config


def _shapes(inputs: Mapping[str, str], sizes: Sizes) -> dict[str, list[tuple[int, ...]]]:
    """Fill the open dimensions of the manifest's `type[dims]`."""
    found = {}
    for name, text in inputs.items():
        dims = re.findall(r"\w+", text.partition("[")[2])
        found[name] = [tuple(sizes[dim][which] if dim in sizes else int(dim) for dim in dims) for which in range(3)]
    return found


def _split_fp32_attention(network: Any) -> None:
    """Let the builder take fp32 attention apart: it has fused kernels for fp16 and bf16 alone, and refuses otherwise."""
    trt = import_builder()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT and layer.get_input(0).dtype == trt.float32:
            layer.__class__ = trt.IAttentionInputLayer  # how TensorRT's Python API casts down
            layer.attention.decomposable = True


@functools.cache
def _listener() -> Any:
    """Remember the builder's last error; one for the whole process, because TensorRT keeps to the first logger it gets."""
    trt = import_builder()

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors for our own message, passes the rest on quietly."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last_error = message
            logger.debug("TensorRT-RTX: %s", message)

    return Listener()


def _reason(message: str) -> str:
    """Last line of what the builder said."""
    return " ".join((message.strip().splitlines() or ["it gives no reason"])[-1].split())[:400]


def _without(manifest: Manifest, names: set[str]) -> Manifest:
    engines = [engine for engine in manifest.engines if engine.file not in names]
    return dataclasses.replace(
        manifest, engines=engines, files={name: entry for name, entry in manifest.files.items() if name not in names}
    )


def _listed(manifest: Manifest, built: Sequence[tuple[EngineEntry, FileEntry]]) -> Manifest:
    """Enter engines, in place of those of the same name."""
    files = {engine.file: entry for engine, entry in built}
    rest = _without(manifest, set(files))
    engines = sorted([*rest.engines, *(engine for engine, _ in built)], key=lambda engine: engine.file)
    return dataclasses.replace(rest, engines=engines, files=dict(sorted((rest.files | files).items())))


def _put(manifest: Manifest, scratch: Path, folder: Path) -> None:
    """Replace the manifest in one step."""
    path = scratch / MANIFEST
    path.write_text(manifest.to_json(), encoding="utf-8")
    _sync(path)
    os.replace(path, folder / MANIFEST)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Give a hidden folder inside the bundle, on the same disk; it is gone afterwards."""
    path: Path | None = None
    try:
        path = Path(tempfile.mkdtemp(prefix=".engines-", dir=folder))
        yield path
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
