"""The frozen vision tower's output on disk, one file per picture, so that each picture is seen once in all epochs and runs.

It is kept before the projector: that stays valid when the projector is trained, and does not depend on how a version of
transformers scales features afterwards.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pgfast.errors import TrainError
from pgfast.image import ImageInput

FORMAT = 1


class FeatureCache:
    """Features by the bytes of the picture.

    Args:
        folder: Where; runs with the same tower share what lies in it.
        tower: The vision tower.
        key: All else that the features depend on: preprocessing and precision.

    Raises:
        TrainError: The folder cannot be written.
    """

    def __init__(self, folder: Path, tower: torch.nn.Module, key: str) -> None:
        self._folder = folder / _tower_digest(tower, key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"--feature-cache {folder} cannot be written: {error.strerror}") from error

    def name_of(self, image: ImageInput) -> str:
        """Name of a picture's features: the hash of its bytes."""
        if isinstance(image, str | os.PathLike):
            image = Path(image).read_bytes()
        if isinstance(image, np.ndarray):
            image = f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()
        return hashlib.sha256(image).hexdigest()

    def load(self, name: str) -> torch.Tensor | None:
        """Return [P, W], or None if it is not there or was not written to its end."""
        try:
            array = np.load(self._folder / f"{name}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.int16 else torch.from_numpy(array)

    def save(self, name: str, hidden: torch.Tensor) -> None:
        """Keep [P, W].

        Raises:
            TrainError: The disk is full or cannot be written.
        """
        array: NDArray[Any] = (hidden.view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden).cpu().numpy()
        partial = self._folder / f"{name}.{os.getpid()}.partial"
        try:
            with partial.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(partial, self._folder / f"{name}.npy")
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise TrainError(f"the feature cache {self._folder} cannot be written: {error.strerror}") from error


def _tower_digest(tower: torch.nn.Module, key: str) -> str:
    digest = hashlib.sha256(f"{FORMAT} {key}\n".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
