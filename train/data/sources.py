"""From what the user typed to a `Dataset`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pgfast.errors import InputError

from .demo_scenes import DemoDataset
from .easy_vqa import EasyVqaDataset
from .hugging_face import open_hub, open_saved
from .jsonl import JsonlDataset
from .records import Dataset
from .vqav2 import VqaDataset

_EASY_VQA: dict[str, Literal["train", "test"]] = {"easy-vqa:train": "train", "easy-vqa:test": "test"}
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::(.+))?", re.ASCII)
_KINDS = (
    "a VQAv2 questions file (.json), a .jsonl file, a folder, a Hub id such as org/name:train, easy-vqa:train, or demo:train"
)


def open_dataset(spec: str, *, images: Path | None = None, annotations: Path | None = None) -> Dataset:
    """Open training or evaluation data.

    Args:
        spec: `easy-vqa:train` or `easy-vqa:test`; `demo:train`, easy-VQA and scenes; the official VQAv2 questions (`.json`);
            a `.jsonl` file; a folder with `annotations.jsonl` or `_annotations.*.jsonl`, or one that `datasets` saved; or
            `org/name:split` on the Hub.
        images: The folder of the pictures, where they are not beside the data.
        annotations: The VQAv2 annotations, where they are not beside the questions.

    Raises:
        InputError: There is no such data, or it cannot be read; the message says what was looked for.
        MissingDependencyError: A library that reads this kind of data is not installed.
    """
    if annotations is not None and not spec.endswith(".json"):
        raise InputError(f"{spec} takes no annotations: only a VQAv2 questions file does")
    if spec == DemoDataset.name and images is None:
        return DemoDataset()
    if spec in _EASY_VQA:
        if images is not None:
            raise InputError(f"{spec} brings its own pictures: leave out the folder of images")
        return EasyVqaDataset(_EASY_VQA[spec])
    try:
        path = Path(spec).expanduser()
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, an unknown ~user, a null byte
        raise InputError(f"{spec[:80]!r} is no path: {error}") from error
    if is_folder:
        return _open_folder(path, images)
    if is_file and path.suffix in (".json", ".jsonl"):
        return VqaDataset(path, images, annotations) if path.suffix == ".json" else JsonlDataset(path, images)
    if is_file:
        raise InputError(f"{spec} is of no known kind: give {_KINDS}")
    hub = _HUB_ID.fullmatch(spec)
    if hub is None or spec.endswith((".json", ".jsonl")):
        raise InputError(f"{spec} does not exist: give {_KINDS}")
    return open_hub(hub[1], hub[2] or "", images)


def _open_folder(folder: Path, images: Path | None) -> Dataset:
    found = _annotation_files(folder)
    if len(found) == 1:
        return JsonlDataset(found[0], images)
    if found:
        raise InputError(f"{folder} holds several files of annotations: give one of {', '.join(map(str, found))}")
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return open_saved(folder, images)
    below = [str(path.parent) for part in sorted(folder.iterdir()) if part.is_dir() for path in _annotation_files(part)]
    if below:
        raise InputError(f"{folder} holds splits: give one of {', '.join(dict.fromkeys(below))}")
    raise InputError(
        f"{folder} holds no data: looked for annotations.jsonl, _annotations.*.jsonl, "
        "and the state.json of a data set saved by Hugging Face datasets"
    )


def _annotation_files(folder: Path) -> list[Path]:
    plain = folder / "annotations.jsonl"
    return ([plain] if plain.is_file() else []) + sorted(folder.glob("_annotations*.jsonl"))
