"""JSONL files of `{image, prefix | question, suffix | answer | answers, ...}`, as Roboflow, maestro, big_vision write them."""

from __future__ import annotations

from pathlib import Path

from pgfast.errors import InputError

from .json_file import find_lines
from .records import Record
from .rows import picture_folder, picture_path, to_record


class JsonlDataset:
    """Rows of a JSONL file; only the places of its lines are held in memory.

    Args:
        path: The file.
        images: The folder that the rows' `image` is relative to; None is the file's own.

    Raises:
        InputError: The file cannot be read or holds no rows, or there is no such folder.
    """

    def __init__(self, path: Path, images: Path | None) -> None:
        self._images = picture_folder(images or path.parent, f"the pictures of {path}")
        self._name = f"{path.absolute().parent.name}/{path.name}"
        try:
            self._rows = find_lines(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        if not len(self._rows):
            raise InputError(f"{path} holds no rows")

    @property
    def name(self) -> str:
        """The file with its folder."""
        return self._name

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, row: int) -> Record:
        """Parse a row; see `Dataset.record`."""
        fields = self._rows.parse(row)
        return to_record(fields, row, picture_path(self._images, fields.get("image")))

    def image(self, row: int) -> str:
        """Return the picture's path."""
        return picture_path(self._images, self._rows.parse(row).get("image"))
