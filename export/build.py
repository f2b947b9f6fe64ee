"""The export, top to bottom: plan, stream the weights, write the manifest, verify, rename into place."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pgfast.bundle import Bundle, describe_file
from pgfast.errors import ExportError
from pgfast.manifest import MANIFEST, TOKENIZER, GraphSpec, Manifest

from . import weights
from .data_file import DataFile
from .graphs import DECODER, MASK_DECODER, Graph, describe
from .mask_decoder import Weights, add_mask_decoder
from .mask_decoder import read_weights as read_mask_weights
from .plan import ExportOptions, Plan, bytes_of, make_plan, shape_and_type
from .storage import Kind
from .tensorrt_engines import add_engines, check_options
from .tensors import Array, Checkpoint
from .verify import Sample, check_possible, read_samples, verify

FP16_MAX = 65504.0
Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


def export(checkpoint: str, out: Path, options: ExportOptions, on_progress: Progress = lambda done, total: None) -> Manifest:
    """Write a bundle.

    Args:
        checkpoint: A local Hugging Face folder, or a Hub id; or a bundle, to add a mask decoder to a copy of it.
        out: Folder to create; it must not exist.
        options: Precision, target and prompt.
        on_progress: Called as weights are written.

    Raises:
        ExportError: The checkpoint is not usable, `out` exists, or the disk is full. Nothing is left behind.
        WeightMismatchError: Tensors do not fit the config.
        MissingDependencyError: The target needs a builder that is not installed.
    """
    if os.path.lexists(out):
        raise ExportError(f"{out} exists: choose another folder or remove it")
    masks = read_mask_weights(options.mask_decoder) if options.mask_decoder else None
    if os.path.isfile(os.path.join(checkpoint, MANIFEST)):  # unlike pathlib, no exception for names that no system has
        if masks is None or options != ExportOptions(mask_decoder=options.mask_decoder):
            raise ExportError(f"{checkpoint} is a bundle already: --mask-decoder alone can be added to it")
        return _extended(Bundle.open(Path(checkpoint)), out, masks)
    capabilities = check_options(options.target, options.compute_capabilities)
    samples = read_samples(options.verify_data) if options.verify_data else None
    plan = make_plan(checkpoint, options)
    if options.verify or samples:
        check_possible((plan.manifest.precision, plan.manifest.vision_precision), options.adapter)
    # every engine holds the weights of its graph
    check_disk(out, plan.total_bytes * (1 + len(capabilities)))
    with appears_whole(out) as partial:
        manifest = dataclasses.replace(plan.manifest, files=_write_files(plan, partial, on_progress))
        manifest = dataclasses.replace(manifest, graphs=_with_shared_weights(plan))
        manifest = add_engines(manifest, partial, capabilities)
        if masks is not None:  # after the engines: the runtime has it on the CPU whatever the target
            manifest = add_mask_decoder(manifest, partial, masks)
        _write_manifest(manifest, partial)
        # read it back through the runtime's own checks: what it would refuse never gets a name
        written = Bundle.open(partial)
        if options.verify or samples:
            manifest = dataclasses.replace(manifest, parity=_verify(plan, written, samples, options.adapter))
            _write_manifest(manifest, partial)
    return manifest


def _extended(bundle: Bundle, out: Path, masks: Weights) -> Manifest:
    """Write a bundle again with a mask decoder; files that stay are second names of the old ones where there are links."""
    with appears_whole(out) as partial:
        for name in bundle.manifest.files.keys() - {f"{MASK_DECODER}.onnx"}:
            link(bundle.path(name), partial / name)
        manifest = add_mask_decoder(bundle.manifest, partial, masks)
        _write_manifest(manifest, partial)
        Bundle.open(partial)
    return manifest


def _write_files(plan: Plan, folder: Path, on_progress: Progress) -> dict[str, Any]:
    """Write graphs, weights and tokenizer; returns their entries for the manifest."""
    done, total = 0, plan.total_bytes

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    files = {}
    for name, graph in plan.graphs.items():
        if name not in plan.rows:
            share_weights(graph, plan.graphs[DECODER])
        else:
            with DataFile(folder / f"{name}.onnx.data", on_bytes) as data:
                write_weights(graph, plan.rows[name], plan.tensors, data)
                files[data.path.name] = data.finish()
        ir.save(graph.model, folder / f"{name}.onnx")
    shutil.copyfile(plan.source.path / TOKENIZER, folder / TOKENIZER)
    for path in folder.iterdir():
        if path.name not in files:
            files[path.name] = describe_file(path)
    return dict(sorted(files.items()))


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _verify(plan: Plan, bundle: Bundle, samples: list[Sample] | None, adapter: Path | None) -> dict[str, Any]:
    try:
        return verify(plan.source.path, bundle, samples, adapter)
    except OSError as error:  # of transformers, not of our writing
        raise ExportError(f"transformers cannot load the checkpoint: {error}") from error


def write_weights(graph: Graph, rows: Sequence[weights.Row], tensors: Checkpoint, data: DataFile) -> None:
    """Write the initializers of one graph, one tensor at a time, and point the graph at them."""
    values = {str(value.name): value for value in graph.parameters()}
    for row in rows:
        name = row.parameter
        value = values.pop(name)
        storage = graph.storages.get(name)
        if storage is None or storage.kind is Kind.PLAIN:
            cast = functools.partial(_cast, dtype=shape_and_type(value)[1], name=name)
            _place(value, data, row.pieces(tensors, cast))
            continue
        scale = values.pop(f"{name}_scale")
        dtype = shape_and_type(scale)[1]
        # dequantized weights have the scale's type, so they must fit it as plain ones would
        pieces, scales = storage.encode(_in_range(piece, dtype, name) for piece in row.raw_rows(tensors))
        offset = _place(value, data, pieces)
        joined = storage.join_scales(scales)
        if not np.isfinite(joined).all():
            raise ExportError(f"{name} holds values too large to quantize: export with --precision fp32")
        _place(scale, data, [joined.astype(dtype.numpy())])
        if (flat := values.pop(f"{name}_rows", None)) is not None:  # the same bytes under another shape
            _point(flat, data, offset)
    assert not values, f"no row of the weight table for {sorted(values)}"


def share_weights(graph: Graph, owner: Graph) -> None:
    """Point the initializers of a graph at those of another, which are in its data file: weights exist once."""
    theirs = owner.model.graph.initializers
    for value in graph.parameters():
        other = theirs[str(value.name)]
        assert shape_and_type(value) == shape_and_type(other), value.name
        value.const_value = other.const_value


def _with_shared_weights(plan: Plan) -> dict[str, GraphSpec]:
    """The graphs of the manifest; one that shares the decoder's weights says where they lie, so that the runtime can too."""
    specs = dict(plan.manifest.graphs)
    for name in specs.keys() - plan.rows.keys():
        places = {
            str(value.name): f"{describe(value)}@{value.const_value.offset}"
            for value in plan.graphs[name].model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        specs[name] = dataclasses.replace(specs[name], weights=places)
    return specs


def _place(value: ir.Value, data: DataFile, pieces: Iterable[Array]) -> int:
    offset = data.add(pieces, bytes_of(value))
    _point(value, data, offset)
    return offset


def _point(value: ir.Value, data: DataFile, offset: int) -> None:
    shape, dtype = shape_and_type(value)
    file, name = data.path.name, str(value.name)
    value.const_value = ir.ExternalTensor(
        file, offset, bytes_of(value), dtype, shape=ir.Shape(shape), name=name, base_dir=data.path.parent
    )


def _in_range(array: Array, dtype: ir.DataType, name: str) -> Array:
    """Return the array; a weight that fp16 cannot hold is an error, not an infinity."""
    if dtype is ir.DataType.FLOAT16 and array.size and max(array.max(), -array.min()) > FP16_MAX:
        raise ExportError(f"{name} holds values beyond fp16's range: export with --precision fp32")
    return array


def _cast(array: Array, dtype: ir.DataType, name: str) -> Array:
    return _in_range(array, dtype, name).astype(dtype.numpy(), copy=False)


def check_disk(out: Path, needed: int) -> None:
    """Refuse before any work if the weights alone do not fit.

    Raises:
        ExportError: The message says how much is free and how much is needed.
    """
    try:
        folder = next(parent for parent in out.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ExportError(f"{out} cannot be created: {error.strerror}") from error
    if free < needed + 2**20:
        raise ExportError(f"the disk of {folder} has {free / 1e9:.1f} GB free, the bundle needs {needed / 1e9:.1f} GB")


@contextmanager
def appears_whole(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside `out` to write into; it gets its name only when everything is on disk.

    An export that fails removes it; one that is killed leaves a hidden folder without a manifest, which nothing loads.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]  # innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # private until it is whole; the folder inside has the rights of any new folder
        private = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        partial = private / out.name
        partial.mkdir()
    except OSError as error:
        raise ExportError(f"{out} cannot be created: {error.strerror}") from error
    try:
        yield partial
        for path in (path for path in partial.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.rename(partial, out)
        made = []
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(f"the disk of {out.parent} is full: free some space and export again") from error
        raise ExportError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(private, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()


def link(file: Path, name: Path) -> None:
    """A second name for a file, or a copy where there are no links."""
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(file, name)
