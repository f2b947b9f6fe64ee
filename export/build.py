"""The export, top to bottom: read the config, build the graphs, stream the weights, write the manifest, rename into place."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import pgfast
from pgfast import bundle
from pgfast.bundle import Bundle, Dimensions, Limits, Manifest, Source, TokenIds
from pgfast.errors import ExportError

from . import graphs, weights
from .checkpoint import CheckpointFolder, locate, read_image_spec
from .config import PaliGemmaConfig, read_config
from .data_file import DataFile
from .layers import Dialect
from .tensors import Array, Checkpoint

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
DIALECT_OF = {"cpu": Dialect.ORT, "cuda": Dialect.ORT, "tensorrt": Dialect.STANDARD}
PROMPTS = {
    "answer": "answer {language} {text}",
    "caption": "caption {language}",
    "detect": "detect {text}",
    "segment": "segment {text}",
    "ocr": "ocr",
}
"""The prefixes PaliGemma was pretrained with (big_vision, configs/proj/paligemma/README.md)."""
TEXT_TOKENS = 128
"""Most prompt tokens, and most new tokens: the text length of PaliGemma's pretraining."""
Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to write."""

    precision: str = "fp32"
    target: str = "cpu"
    answer_template: str = PROMPTS["answer"]
    """Prompt of a question; a checkpoint that was fine-tuned with another prefix needs its own."""
    verify: bool = False
    """Compare the bundle with transformers before it gets its name."""


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
    if options.precision not in DTYPES or options.target not in DIALECT_OF:
        raise ExportError(f"precision is one of {', '.join(DTYPES)}; target is one of {', '.join(DIALECT_OF)}")
    if "{text}" not in options.answer_template:
        raise ExportError("the answer template has no {text} for the question")
    if out.exists():
        raise ExportError(f"{out} exists: choose another folder or remove it")
    source = locate(checkpoint)
    config = read_config(source.path / "config.json")
    tensors = Checkpoint(source.path)
    rows = {
        graphs.VISION_ENCODER: list(weights.vision_rows(config)),
        graphs.DECODER: list(weights.decoder_rows(config)),
    }
    weights.check_weights(tensors, [row for group in rows.values() for row in group], tied=config.text.tied)
    manifest = _manifest(config, options, source)
    dtype = DTYPES[options.precision]
    models = {
        graphs.VISION_ENCODER: graphs.build_vision_encoder(config, dtype),
        graphs.DECODER: graphs.build_decoder(config, dtype, DIALECT_OF[options.target], manifest.cache_length),
    }
    specs = {name: graphs.graph_spec(model, f"{name}.onnx") for name, model in models.items()}
    total = sum(_bytes_of(value) for model in models.values() for value in _parameters(model))
    check_disk(out, total)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    with _appears_whole(out) as partial:
        files = {}
        for name, model in models.items():
            with DataFile(partial / f"{name}.onnx.data", on_bytes) as data:
                _write_weights(model, rows[name], tensors, data)
                files[data.path.name] = data.finish()
            ir.save(model, partial / f"{name}.onnx")
        _copy_tokenizer(source.path, partial)
        for path in partial.iterdir():
            files.setdefault(path.name, bundle.describe_file(path))
        files = dict(sorted(files.items()))
        manifest = dataclasses.replace(manifest, graphs=specs, files=files)
        (partial / bundle.MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        # read it back through the runtime's own checks: what it would refuse never gets a name
        written = Bundle.open(partial)
        if options.verify:
            from .verify import verify

            manifest = dataclasses.replace(manifest, parity=verify(source.path, written))
            (partial / bundle.MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _manifest(config: PaliGemmaConfig, options: ExportOptions, source: CheckpointFolder) -> Manifest:
    """Everything but the graphs and the files, which are not written yet."""
    text, p = config.text, config.vision.num_image_tokens
    room = min(TEXT_TOKENS, (text.max_position_embeddings - p) // 2)
    return Manifest(
        format_version=bundle.FORMAT_VERSION,
        family="paligemma2" if text.model_type == "gemma2" else "paligemma",
        precision=options.precision,
        target=options.target,
        dialect=str(DIALECT_OF[options.target]),
        dimensions=Dimensions(
            num_image_tokens=p,
            **{f.name: getattr(text, f.name) for f in dataclasses.fields(Dimensions) if f.name != "num_image_tokens"},
        ),
        image=read_image_spec(source.path, config.vision.image_size),
        tokens=TokenIds(config.bos_token_id, config.eos_token_id, config.pad_token_id, config.image_token_id),
        prompts=PROMPTS | {"answer": options.answer_template},
        limits=Limits(prompt_tokens=room, new_tokens=room),
        graphs={},
        files={},
        source=Source(source.name, source.revision),
        exporter=f"pgfast {pgfast.__version__}",
    )


def _parameters(model: ir.Model) -> list[ir.Value]:
    """Initializers that come from the table; the builder's own constants already have their value."""
    return [value for value in model.graph.initializers.values() if value.const_value is None]


def _bytes_of(value: ir.Value) -> int:
    shape, dtype = _shape_and_type(value)
    return int(np.prod(shape) * dtype.itemsize)


def _shape_and_type(value: ir.Value) -> tuple[tuple[int, ...], ir.DataType]:
    """Parameters always have both."""
    assert value.shape is not None
    assert value.dtype is not None
    return tuple(value.shape.numpy()), value.dtype


def _write_weights(model: ir.Model, rows: Sequence[weights.Row], tensors: Checkpoint, data: DataFile) -> None:
    """Write the initializers of one graph, one tensor at a time, and point the graph at them."""
    by_name = {row.parameter: row for row in rows}
    parameters = _parameters(model)
    assert {value.name for value in parameters} == set(by_name), "graph and weight table differ"
    for value in parameters:
        shape, dtype = _shape_and_type(value)
        name, nbytes = str(value.name), _bytes_of(value)
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
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise ExportError(f"the disk of {folder} has {free / 1e9:.1f} GB free, the bundle needs {needed / 1e9:.1f} GB")


def _copy_tokenizer(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source / bundle.TOKENIZER, target / bundle.TOKENIZER)
    except FileNotFoundError as error:
        raise ExportError(f"no {bundle.TOKENIZER} in {source}: save the fast tokenizer with the checkpoint") from error


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
