"""The bundle: a directory with a manifest, a tokenizer and ONNX graphs, checked against the manifest when it is opened."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pgfast.errors import BundleError
from pgfast.graph_check import check_graph
from pgfast.manifest import MANIFEST, FileEntry, Manifest

HASH_AT_LOAD = 64 * 2**20
"""Files up to this many bytes are hashed at every load, larger ones by `pgfast inspect --check`."""
MOST_MANIFEST_BYTES = 16 * 2**20
"""Of a large model it has a hundredth."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose small files were checked."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, *, full_check: bool = False) -> Bundle:
        """Read the manifest and check every file against it.

        Args:
            folder: The bundle's directory.
            full_check: Hash files larger than 64 MiB too.

        Raises:
            BundleError: Something is missing, changed or unreadable; the message names the file.
        """
        try:
            if not folder.is_dir():
                raise BundleError(f"{folder} is not a bundle directory: make one with 'pgfast export CHECKPOINT {folder}'")
            text = _read_manifest(folder / MANIFEST)
        except FileNotFoundError as error:
            raise BundleError(f"{folder} has no {MANIFEST}: it is not a bundle, or its export was interrupted") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{folder / MANIFEST} cannot be read: {error}") from error
        manifest = Manifest.from_json(text)
        try:
            for name, entry in manifest.files.items():
                _check_file(folder, name, entry, full_check)
            unlisted = {path.name for path in folder.iterdir() if path.suffix in (".onnx", ".data")} - set(manifest.files)
            if unlisted:
                raise BundleError(
                    f"{min(unlisted)!r} is not in the manifest: nothing vouches for it, remove it or export again"
                )
            sizes = {name: entry.size for name, entry in manifest.files.items()}
            for graph in manifest.graphs.values():
                check_graph(folder / graph.file, sizes)
        except OSError as error:
            raise BundleError(f"{folder} cannot be read: {error}") from error
        return cls(folder, manifest)

    def path(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.folder / name


def describe_file(path: Path) -> FileEntry:
    """Hash and measure a file for the manifest."""
    return FileEntry(sha256_of(path), path.stat().st_size)


def sha256_of(path: Path) -> str:
    """Hash a file, streaming."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> str:
    # a pipe would be waited for, a device read without end
    if path.exists() and not (path.is_file() and path.stat().st_size <= MOST_MANIFEST_BYTES):
        raise BundleError(f"{path} is not a manifest: a file of at most {MOST_MANIFEST_BYTES >> 20} MiB")
    return path.read_text(encoding="utf-8")


def _check_file(folder: Path, name: str, entry: FileEntry, full_check: bool) -> None:
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{name} is missing from the bundle {folder}")
    if path.resolve().parent != folder.resolve():
        raise BundleError(f"{name} is a link that leads out of the bundle {folder}: copy the bundle with its files")
    size = path.stat().st_size
    if size != entry.size:
        raise BundleError(f"{name} has {size} bytes where the manifest says {entry.size}: copy or export the bundle again")
    if (full_check or size <= HASH_AT_LOAD) and sha256_of(path) != entry.sha256:
        raise BundleError(f"{name} was changed after the export (its hash differs): copy or export the bundle again")
