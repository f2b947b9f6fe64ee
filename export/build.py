"""The export, top to bottom: plan, stream the weights, write the manifest, verify, rename into place."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pgfast.bundle import Bundle, describe_file
from pgfast.errors import ExportError
from pgfast.manifest import MANIFEST, TOKENIZER, Manifest

from . import weights
from .data_file import DataFile
from .plan import ExportOptions, Plan, bytes_of, make_plan, parameters, shape_and_type
from .tensors import Array, Checkpoint

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


def export(checkpoint: str, out: Path, options: ExportOptions, on_progress: Progress = lambda done, total: None) -> Manifest:
    """Write a bundle.

    Args:
        checkpoint: A local Hugging Face folder, or a Hub id.
        out: Folder to create; it must not exist.
        options: Precision, target and prompt.
        on_progress: Called as weights are written.

    Raises:
        ExportError: The checkpoint is not usable, `out` exists, or the disk is full. Nothing is left behind.
        WeightMismatchError: Tensors do not fit the config.
    """
    if os.path.lexists(out):
        raise ExportError(f"{out} exists: choose another folder or remove it")
    plan = make_plan(checkpoint, options)
    check_disk(out, plan.total_bytes)
    with _appears_whole(out) as partial:
        manifest = dataclasses.replace(plan.manifest, files=_write_files(plan, partial, on_progress))
        _write_manifest(manifest, partial)
        # read it back through the runtime's own checks: what it would refuse never gets a name
        written = Bundle.open(partial)
        if options.verify:
            manifest = dataclasses.replace(manifest, parity=_verify(plan, written, options.adapter))
            _write_manifest(manifest, partial)
    return manifest


def _write_files(plan: Plan, folder: Path, on_progress: Progress) -> dict[str, Any]:
    """Write graphs, weights and tokenizer; returns their entries for the manifest."""
    done, total = 0, plan.total_bytes

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    files = {}
    for name, model in plan.models.items():
        with DataFile(folder / f"{name}.onnx.data", on_bytes) as data:
            _write_weights(model, plan.rows[name], plan.tensors, data)
            files[data.path.name] = data.finish()
        ir.save(model, folder / f"{name}.onnx")
    shutil.copyfile(plan.source.path / TOKENIZER, folder / TOKENIZER)
    for path in folder.iterdir():
        if path.name not in files:
            files[path.name] = describe_file(path)
    return dict(sorted(files.items()))


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _verify(plan: Plan, bundle: Bundle, adapter: Path | None) -> dict[str, Any]:
    from .verify import verify

    try:
        return verify(plan.source.path, bundle, adapter)
    except OSError as error:  # of transformers, not of our writing
        raise ExportError(f"transformers cannot load the checkpoint: {error}") from error


def _write_weights(model: ir.Model, rows: Sequence[weights.Row], tensors: Checkpoint, data: DataFile) -> None:
    """Write the initializers of one graph, one tensor at a time, and point the graph at them."""
    by_name = {row.parameter: row for row in rows}
    values = parameters(model)
    assert {value.name for value in values} == set(by_name), "graph and weight table differ"
    for value in values:
        shape, dtype = shape_and_type(value)
        name, nbytes = str(value.name), bytes_of(value)
        cast = functools.partial(_cast, dtype=dtype, name=name)
        offset = data.add(by_name[name].pieces(tensors, cast), nbytes)
        value.const_value = ir.ExternalTensor(
            data.path.name, offset, nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=data.path.parent
        )


def _cast(array: Array, dtype: ir.DataType, name: str) -> Array:
    """Convert to the graph's type; a weight that fp16 cannot hold is an error, not an infinity."""
    if dtype is ir.DataType.FLOAT16 and array.size and max(array.max(), -array.min()) > np.finfo(np.float16).max:
        raise ExportError(f"{name} holds values beyond fp16's range: export with --precision fp32")
    return array.astype(dtype.numpy(), copy=False)


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
def _appears_whole(out: Path) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write into; it gets its name only when everything is on disk.

    An export that fails removes it; one that is killed leaves a hidden folder without a manifest, which nothing loads.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out} cannot be created: {error.strerror}") from error
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)
        os.rename(partial, out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(f"the disk of {out.parent} is full: free some space and export again") from error
        raise ExportError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
