"""The safetensors files of a checkpoint, read piece by piece with plain file reads.

safetensors' own reader maps the file, and every page it touches stays in the process: reading 6 GB would take 6 GB. It still
checks the headers here; only the bytes are read by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pgfast.errors import ExportError, WeightMismatchError

Array = NDArray[Any]

PIECE_BYTES = 64 * 2**20
"""Upper bound of what is in memory of a tensor that is read in pieces, as float32."""
_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_LAYOUTS = (
    # transformers has written the same tensors under these prefixes; the right-hand side is the name used here
    (re.compile(r"^model\.(?=vision_tower|multi_modal_projector|language_model)"), ""),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
_BUFFERS = re.compile(r"\.(position_ids|inv_freq)$")
"""Not weights: older versions saved them, and they follow from the config."""


def canonical_name(name: str) -> str:
    """Map a tensor's name in any of transformers' layouts to the one used here."""
    for pattern, replacement in _LAYOUTS:
        name = pattern.sub(replacement, name)
    return name


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    stored_name: str
    dtype: str
    """safetensors' word, for example BF16."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""


class Checkpoint:
    """All tensors of a checkpoint folder, by canonical name.

    Args:
        folder: Holds `model.safetensors`, or shards with `model.safetensors.index.json`; or one safetensors file.

    Raises:
        ExportError: There are no safetensors, a shard is missing, or a file is damaged.
        WeightMismatchError: A tensor is stored twice.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for file in _files(folder):
            for tensor in read_header(file):
                name = canonical_name(tensor.stored_name)
                if name in self._tensors:
                    raise WeightMismatchError(f"{file.name} holds {tensor.stored_name} a second time")
                if not _BUFFERS.search(name):
                    self._tensors[name] = tensor

    def names(self) -> set[str]:
        """Canonical names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored; nothing is read."""
        return self._tensors[name].shape

    def check_dtype(self, name: str) -> None:
        """Refuse types that are no plain floating-point weights."""
        tensor = self._tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ExportError(
                f"{tensor.stored_name} in {tensor.file.name} has type {tensor.dtype}: only {', '.join(_DTYPES)} are read "
                "(export from the checkpoint before it was quantized)"
            )

    def pieces(self, name: str) -> Iterator[Array]:
        """Read a tensor as float32, in runs of whole rows of at most `PIECE_BYTES`.

        Raises:
            ExportError: A value is not finite; the message names the tensor.
        """
        yield from read_pieces(self._tensors[name])

    def read(self, name: str) -> Array:
        """Read a whole tensor as float32 (raises as `pieces`)."""
        out = np.empty(self.shape(name), np.float32)
        flat, at = out.reshape(-1), 0
        for piece in self.pieces(name):
            flat[at : at + piece.size] = piece.reshape(-1)
            at += piece.size
        return out


def read_header(file: Path) -> Iterator[StoredTensor]:
    """List the tensors of one file; safetensors itself checks the header against the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{file.name} is damaged or incomplete: {error}") from error
    for name, entry in header.items():
        if name != "__metadata__":
            shape = tuple(entry["shape"])
            yield StoredTensor(file, name, entry["dtype"], shape, 8 + length + entry["data_offsets"][0])


def read_pieces(tensor: StoredTensor) -> Iterator[Array]:
    """Read one stored tensor as float32, in runs of whole rows."""
    dtype = np.dtype(_DTYPES[tensor.dtype])
    rows = tensor.shape[0] if tensor.shape else 1
    row_size = int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, PIECE_BYTES // max(1, 4 * row_size))
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            piece = np.fromfile(stream, dtype, count * row_size).astype(np.float32, copy=False)
            # the smallest and the largest value show a NaN or an infinity without a mask of the whole piece
            if piece.size and not (np.isfinite(piece.min()) and np.isfinite(piece.max())):
                raise ExportError(f"{tensor.stored_name} in {tensor.file.name} holds NaN or infinite values")
            yield piece.reshape(count, *tensor.shape[1:]) if tensor.shape else piece.reshape(())


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ExportError(f"{index.name} cannot be read: {error!r}") from error
        if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
            raise ExportError(f"{missing[0]} is missing: {index.name} lists {len(names)} files, download the rest")
        return [folder / name for name in names]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickles := sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]):
        raise ExportError(
            f"{pickles[0].name} is a pickle, which can run code when it is read; convert it where you trust it: python -c "
            f'"from transformers import PaliGemmaForConditionalGeneration as P; '
            f"P.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise ExportError(f"no safetensors in {folder}: save the model there with save_pretrained")
