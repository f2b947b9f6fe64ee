"""Data sets of Hugging Face: folders that `datasets` saved, and the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pgfast.errors import InputError, MissingDependencyError

from .records import Record, RowError
from .rows import FIELDS, picture_folder, picture_path, to_record


class HuggingFaceDataset:
    """Rows of a `datasets.Dataset`: `image`, `question` or `prefix`, and what else of `rows.FIELDS` is there.

    Rows with the same `image_id`, where there is such a column, or the same path share a picture.

    Args:
        table: The data set.
        name: What a report calls it.
        images: Absolute path of the folder that pictures given by path are in.

    Raises:
        InputError: No rows, a column is missing, or `image` holds no pictures.
    """

    def __init__(self, table: Any, name: str, images: str) -> None:
        import datasets

        if not len(table):
            raise InputError(f"{name} holds no rows")
        columns = set(table.column_names)
        if "image" not in columns or not columns & {"question", "prefix"}:
            raise InputError(f"{name} needs the columns image and question or prefix: it has {', '.join(sorted(columns))}")
        kind = table.features["image"]
        self._by_path = kind == datasets.Value("string")
        if not self._by_path and not isinstance(kind, datasets.Image):
            raise InputError(f"{name}: the column image holds {kind}: pictures or their paths are needed")
        table = table.with_format(None)  # a saved format may ask for torch
        # two views, so that reading a question leaves the picture's bytes on the disk
        texts = [*FIELDS, "image_id", *(["image"] if self._by_path else [])]
        self._texts = table.select_columns([column for column in texts if column in columns])
        pictures = table.select_columns(["image"])
        self._pictures = pictures if self._by_path else pictures.cast_column("image", datasets.Image(decode=False))
        self._name, self._images = name, images

    @property
    def name(self) -> str:
        """The folder, or the Hub id with its split."""
        return self._name

    def __len__(self) -> int:
        return len(self._texts)

    def record(self, row: int) -> Record:
        """Read a row without its picture; see `Dataset.record`."""
        fields = self._texts[row]
        if self._by_path:
            return to_record(fields, row, picture_path(self._images, fields["image"]))
        picture = fields.get("image_id")
        return to_record(fields, row, f"{self._name}/{f'row {row}' if picture is None else picture}")

    def image(self, row: int) -> str | bytes:
        """Return the picture's bytes or path."""
        value = self._pictures[row]["image"]
        if value is None:
            raise RowError("there is no picture")
        if isinstance(value, str):
            return picture_path(self._images, value)
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        return picture_path(self._images, value["path"])


def open_saved(folder: Path, images: Path | None) -> HuggingFaceDataset:
    """Open a folder written by `datasets.Dataset.save_to_disk`.

    Raises:
        InputError: Damaged, or a folder of several splits.
        MissingDependencyError: `datasets` is not installed.
    """
    datasets = _datasets()
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(str(path.parent) for path in folder.glob("*/state.json"))
        raise InputError(f"{folder} holds splits: give one of {', '.join(splits) or 'them (there is none)'}")
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever Arrow and JSON make of a damaged folder
        raise InputError(f"{folder} cannot be read as a data set: {_reason(error)}") from error
    return HuggingFaceDataset(table, folder.absolute().name, picture_folder(images or folder, "the pictures"))


def open_hub(id: str, split: str, images: Path | None) -> HuggingFaceDataset:
    """Open a data set of the Hub, downloading it if it is not in the cache.

    Args:
        id: `org/name`.
        split: Which split, for example `train` or `train[:1000]`; may be empty if there is only one.
        images: Folder of pictures given by path.

    Raises:
        InputError: No such data set or split, no access, no network.
        MissingDependencyError: `datasets` is not installed.
    """
    datasets = _datasets()
    try:
        if not split:
            splits = datasets.get_dataset_split_names(id)
            if len(splits) != 1:
                raise InputError(f"{id} has several splits: give one of {', '.join(f'{id}:{name}' for name in splits)}")
            split = splits[0]
        table = datasets.load_dataset(id, split=split)
    except InputError:
        raise
    except Exception as error:  # the Hub's client and the readers of a dozen formats have no common error
        raise InputError(
            f"{id} is no local file or folder, and cannot be had from the Hub ({_reason(error)}): for a gated data set accept "
            "its terms and run 'hf auth login'; without a network give a folder that `datasets` saved"
        ) from error
    # pictures that the Hub keeps as files are in the cache
    folder = picture_folder(images, "the pictures") if images else os.path.abspath(datasets.config.HF_CACHE_HOME)
    return HuggingFaceDataset(table, f"{id}:{split}", folder)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "datasets") from error
    return datasets


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return (text if len(text) <= 200 else text[:197] + "...") or type(error).__name__
