"""A folder of pictures as IN of `pgfast batch`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from pgfast.errors import InputError

from .rows import Defaults, Row, Survey

SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2"),
)
"""What a picture's name in a folder ends with, in small or capital letters."""


class FolderSource:
    """All pictures below a folder, by name; hidden ones are left out and links to folders are not followed."""

    kind = "folder"

    def __init__(self, folder: str, defaults: Defaults) -> None:
        self._folder, self.defaults = folder, defaults
        self.ignored: set[str] = set()
        if defaults.question is None and defaults.prompt is None:
            raise InputError(f"{folder} is a folder of pictures: say with --question or --prompt what to ask about each")

    def survey(self) -> Survey:
        """See `Source.survey`."""
        digest, rows = hashlib.sha256(), 0
        for name in _pictures(self._folder):
            try:
                size = os.stat(os.path.join(self._folder, name)).st_size
            except OSError:  # a link that leads nowhere; it becomes an error row
                size = -1
            digest.update(b"%d %b\0" % (size, os.fsencode(name)))
            rows += 1
        if not rows:
            raise InputError(f"{self._folder} holds no pictures ({', '.join(SUFFIXES[:7])} and so on)")
        return Survey(digest.hexdigest(), rows)

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """See `Source.rows`."""
        for number, name in enumerate(_pictures(self._folder)):
            if number >= skip:
                d, path = self.defaults, os.path.join(self._folder, name)
                yield Row(number, image=name, picture=path, question=d.question, prompt=d.prompt, language=d.language)


def _pictures(folder: str, below: str = "") -> Iterator[str]:
    """Yield paths relative to the folder, sorted by name within each."""
    try:
        with os.scandir(os.path.join(folder, below)) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if entry.name[0] != ".")
    except OSError as error:
        raise InputError(f"{os.path.join(folder, below)} cannot be read: {error.strerror}") from error
    for name, is_folder in found:
        path = os.path.join(below, name)
        if is_folder:
            yield from _pictures(folder, path)
        elif name.lower().endswith(SUFFIXES):
            yield path
