"""The official VQAv2 files (visualqa.org): questions, annotations, and pictures of COCO."""

from __future__ import annotations

import os
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.errors import InputError

from .json_file import JsonSlices, as_int64, members
from .records import Record
from .rows import picture_folder, to_record


class VqaDataset:
    """Questions with their annotations; only ids and places in the files are held in memory.

    Args:
        path: `v2_OpenEnded_mscoco_train2014_questions.json` or one like it.
        images: The folder with the pictures; None is the one named by `data_subtype` beside the file.
        annotations: The annotations; None is the file of the official name beside the questions. Test splits have none.

    Raises:
        InputError: A file is missing, broken, or of another kind; a `question_id` is there twice; questions without annotation.
    """

    def __init__(self, path: Path, images: Path | None, annotations: Path | None) -> None:
        self._name = path.name
        self._questions, (self._ids, self._image_ids), subtype = _read(path, "questions", ("question_id", "image_id"))
        if not isinstance(subtype, str) or not re.fullmatch(r"\w+(-\w+)?", subtype, re.ASCII):
            raise InputError(f"{path}: data_subtype is missing or not a name such as train2014")
        # test-dev2015 asks about some of the pictures of test2015
        self._subtype = subtype.replace("-dev", "")
        self._images = picture_folder(images or path.parent / self._subtype, f"COCO_{self._subtype}_*.jpg")
        self._annotations = self._match(_annotations_of(path, annotations, subtype))

    def _match(self, path: Path | None) -> JsonSlices | None:
        if path is None:
            return None
        annotations, (ids,), _ = _read(path, "annotations", ("question_id",))
        order = np.argsort(ids)
        place = np.minimum(np.searchsorted(ids, self._ids, sorter=order), len(ids) - 1)
        rows = order[place]  # [questions], row of each one's annotation
        missing = self._ids[ids[rows] != self._ids]
        if len(missing):
            raise InputError(
                f"{path}: {len(missing):,} of {len(self._ids):,} questions have no annotation (first: question_id {missing[0]})"
            )
        annotations.take(rows)
        return annotations

    @property
    def name(self) -> str:
        """The questions' file."""
        return self._name

    def __len__(self) -> int:
        return len(self._ids)

    def record(self, row: int) -> Record:
        """Parse a question and its annotation; see `Dataset.record`."""
        fields = self._annotations.parse(row) if self._annotations else {}
        return to_record(fields | self._questions.parse(row), row, self.image(row))

    def image(self, row: int) -> str:
        """Return the picture's path."""
        return os.path.join(self._images, f"COCO_{self._subtype}_{self._image_ids[row]:012d}.jpg")


def _annotations_of(path: Path, given: Path | None, subtype: str) -> Path | None:
    if given is not None:
        return given
    # v2_OpenEnded_mscoco_train2014_questions.json -> v2_mscoco_train2014_annotations.json
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    if beside != path and beside.is_file():
        return beside
    if subtype.startswith("test"):
        return None
    looked = f"no {beside.name} beside it" if beside != path else "its name does not tell that of the annotations"
    raise InputError(f"{path} has no annotations ({looked}): give the file of annotations")


def _read(path: Path, key: str, wanted: tuple[str, ...]) -> tuple[JsonSlices, list[NDArray[np.int64]], Any]:
    """Return (the N objects of the list `key`, [N] for each of their `wanted` numbers, the file's data_subtype)."""
    begin, end = array("q"), array("q")
    numbers = [array("q") for _ in wanted]
    subtype, seen = None, dict[str, None]()
    try:
        for name, value, start, stop in members(path):
            seen[name] = None
            if name == key:
                for field, column in zip(wanted, numbers, strict=True):
                    column.append(_integer(value, field, f"{path}: {key}[{len(begin)}]"))
                begin.append(start)
                end.append(stop)
            elif name == "data_subtype":
                subtype = value
        objects = JsonSlices(path, as_int64(begin), as_int64(end))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not len(objects):
        raise InputError(f"{path} holds no {key}: it is not a VQAv2 file of {key} (its keys: {', '.join(seen) or 'none'})")
    columns = [as_int64(column) for column in numbers]
    ids = np.sort(columns[0])
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise InputError(f"{path}: {wanted[0]} {twice[0]} is there more than once")
    return objects, columns, subtype


def _integer(value: Any, key: str, where: str) -> int:
    if not isinstance(value, dict):
        raise InputError(f"{where} is not an object")
    number = value.get(key)
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 63:
        return number
    raise InputError(f"{where}: {key} is {'missing' if number is None else 'not a whole number'}")
