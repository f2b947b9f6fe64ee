"""`--layout triton`: a model repository for NVIDIA Triton Inference Server.

    pgfast/            a picture and a question in, an answer out: Triton's Python backend runs our engine (triton_model.py)
      1/bundle/        the bundle, as `pgfast export` writes it
    vision_encoder/    the bundle's graphs in Triton's ONNX Runtime backend, for programs with a token loop of their own
    decoder/

The graphs and their weights are hard links to the bundle's files, so they take no space of their own where the file system has
links. They keep their names, because a graph names its data file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgfast.bundle import Bundle
from pgfast.errors import ExportError
from pgfast.manifest import MANIFEST, GraphSpec, Manifest

from .build import appears_whole, check_disk, export, link
from .graphs import DECODER, VISION_ENCODER
from .plan import ExportOptions

VERSION = "1"
BATCH = {"cpu": 16, "cuda": 32}
"""Most rows that Triton hands over at a time, by target: as many as the engine decodes together."""
PICTURES = 8
"""Most pictures that share a run of vision_encoder."""
TYPES = {"int64": "TYPE_INT64", "int32": "TYPE_INT32", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
"""bfloat16 is not among those of Triton's ONNX Runtime backend."""

Section = dict[str, Any]
"""A message of Triton's model_config.proto; lists are repeated fields, `Word`s enum values."""


class Word(str):
    """A value that stands without quotes."""

    __slots__ = ()


def export_triton(
    source: str, out: Path, options: ExportOptions, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """Write a model repository.

    Args:
        source: A checkpoint, as `build.export` takes it, or the folder of a bundle.
        out: Folder to create; it must not exist.
        options: As for a bundle, for the targets cpu and cuda; the defaults if `source` is a bundle.
        on_progress: Called as weights are written.

    Returns:
        The bundle's manifest.

    Raises:
        ExportError: As `build.export`, or Triton cannot serve such a bundle.
        BundleError: `source` is a bundle that is damaged.
    """
    if os.path.lexists(out):
        raise ExportError(f"{out} exists: choose another folder or remove it")
    bundle = Bundle.open(Path(source)) if (Path(source) / MANIFEST).is_file() else None
    if bundle is None:
        _check(options.target, options.precision)
    elif options != ExportOptions():
        raise ExportError(f"{source} is a bundle already: beside --layout triton it takes no options")
    else:
        _check(bundle.manifest.target, bundle.manifest.precision)
        check_disk(out, sum(entry.size for entry in bundle.manifest.files.values()))
    with appears_whole(out) as partial:
        folder = partial / "pgfast" / VERSION / "bundle"
        folder.parent.mkdir(parents=True)
        if bundle is None:
            manifest = export(source, folder, options, on_progress)
        else:
            manifest = bundle.manifest
            _copy(bundle, folder)
        shutil.copyfile(Path(__file__).with_name("triton_model.py"), folder.parent / "model.py")
        _write_config(partial / "pgfast", engine_config(manifest))
        for name, batch in ((VISION_ENCODER, PICTURES), (DECODER, 0)):
            spec = manifest.graphs[name]
            version = partial / name / VERSION
            version.mkdir(parents=True)
            for file in (spec.file, f"{spec.file}.data"):
                if file in manifest.files:
                    link(folder / file, version / file)
            _write_config(partial / name, graph_config(name, spec, manifest.target, batch))
    return manifest


def _check(target: str, precision: str) -> None:
    if target not in BATCH:
        raise ExportError(f"--layout triton is for the targets {' and '.join(BATCH)}, not {target}")
    if precision == "bf16":
        raise ExportError("Triton's ONNX Runtime backend has no bfloat16: take another precision")


def engine_config(manifest: Manifest) -> Section:
    """The configuration of `pgfast`."""

    def tensor(name: str, kind: str, dims: int = 1, **more: bool) -> Section:
        return {"name": name, "data_type": Word(kind), "dims": [dims], **more}

    return {
        "name": "pgfast",
        "backend": "python",
        "max_batch_size": BATCH[manifest.target],
        "input": [
            tensor("image", "TYPE_STRING"),
            tensor("question", "TYPE_STRING"),
            # requests with different numbers of choices may come in one call: they are not joined into one tensor
            tensor("choices", "TYPE_STRING", -1, optional=True, allow_ragged_batch=True),
            tensor("max_new_tokens", "TYPE_INT32", optional=True),
        ],
        "output": [
            tensor("text", "TYPE_STRING"),
            tensor("confidence", "TYPE_FP32"),
            tensor("finish_reason", "TYPE_STRING"),
            tensor("choice_probabilities", "TYPE_FP32", -1),
        ],
        "instance_group": [_instances(manifest.target)],
        "dynamic_batching": {},
        "model_transaction_policy": {"decoupled": False},
        "parameters": [{"key": "provider", "value": {"string_value": manifest.target}}],
    }


def graph_config(name: str, spec: GraphSpec, target: str, batch: int) -> Section:
    """The configuration of a graph.

    Args:
        name: Of the model in the repository.
        spec: The graph's inputs and outputs.
        target: cpu or cuda.
        batch: Most rows that Triton may join into one run; 0: the first dimension is the client's affair, like the others.
    """
    config: Section = {
        "name": name,
        "platform": "onnxruntime_onnx",
        "default_model_filename": spec.file,
        "max_batch_size": batch,
        "input": [_tensor(*pair, batch) for pair in spec.inputs.items()],
        "output": [_tensor(*pair, batch) for pair in spec.outputs.items()],
        "instance_group": [_instances(target)],
    }
    return config | {"dynamic_batching": {}} if batch else config


def _tensor(name: str, described: str, batch: int) -> Section:
    """An input or output from the manifest's words for it, such as `float32[B, 3, 224, 224]`."""
    match = re.fullmatch(r"(\w+)\[(.+)\]", described)
    assert match is not None, described
    dims = [int(dim) if dim.isdigit() else -1 for dim in match[2].split(", ")]
    return {"name": name, "data_type": Word(TYPES[match[1]]), "dims": dims[1:] if batch else dims}


def _instances(target: str) -> Section:
    return {"count": 1, "kind": Word("KIND_GPU" if target == "cuda" else "KIND_CPU")}


def _write_config(folder: Path, config: Section) -> None:
    (folder / "config.pbtxt").write_text("".join(f"{line}\n" for line in _lines(config)), encoding="utf-8")


def _lines(section: Section, indent: str = "") -> list[str]:
    """Protobuf's text format."""
    lines = []
    for field, value in section.items():
        if field == "dims":
            lines.append(f"{indent}dims: [ {', '.join(map(str, value))} ]")
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                lines += [f"{indent}{field} {{", *_lines(item, indent + "  "), f"{indent}}}"]
            else:
                lines.append(f"{indent}{field}: {item if isinstance(item, Word) else json.dumps(item)}")
    return lines


def _copy(bundle: Bundle, folder: Path) -> None:
    """Copy a bundle's own files, and look at all of them: what Triton serves should be what was exported."""
    folder.mkdir()
    for name in (MANIFEST, *bundle.manifest.files):
        shutil.copyfile(bundle.path(name), folder / name)
    Bundle.open(folder, full_check=True)
