"""Every error pgfast raises on purpose.

    PgfastError
    ├── BundleError (ValueError)             a bundle that is damaged, incomplete or too new
    ├── InputError (ValueError)              what the caller gave cannot be used
    │   ├── ImageError
    │   └── PromptError
    ├── ProviderError (RuntimeError)         the device or execution provider asked for cannot run here
    ├── ExportError (RuntimeError)           a checkpoint that cannot become a bundle
    │   └── WeightMismatchError (ValueError)
    ├── TrainError (RuntimeError)            a training run that cannot start or go on
    ├── MissingDependencyError (ImportError) an extra that is not installed
    ├── OverloadedError (RuntimeError)       too much work is waiting
    └── ClusterError (RuntimeError)          a Ray cluster that is not there, has no room, or failed

The message is one line and says what to do next. `assert` is for pgfast's own bugs only.
"""

from __future__ import annotations


class PgfastError(Exception):
    """Root of the tree: catch this to catch everything pgfast raises on purpose."""


class BundleError(PgfastError, ValueError):
    """The bundle is damaged, incomplete, or written by a newer pgfast; the message names the file."""


class InputError(PgfastError, ValueError):
    """A picture, a text or an option that cannot be used."""


class ImageError(InputError):
    """The picture is missing, unreadable or too large."""


class PromptError(InputError):
    """The text is empty, too long, or holds one of the model's own markers."""


class ProviderError(PgfastError, RuntimeError):
    """The execution provider asked for cannot run here; the message names the missing piece."""


class ExportError(PgfastError, RuntimeError):
    """The checkpoint cannot be exported, or the bundle cannot be written."""


class WeightMismatchError(ExportError, ValueError):
    """Tensors of a checkpoint are missing, unexpected, or have another shape than its config says."""


class TrainError(PgfastError, RuntimeError):
    """A training run cannot start or go on."""


class MissingDependencyError(PgfastError, ImportError):
    """A library of an optional extra is not installed.

    Args:
        module: The import name that failed, for example `torch`.
        extra: The extra of pgfast that brings it, for example `train`.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed: pip install 'pgfast[{extra}]'")


class OverloadedError(PgfastError, RuntimeError):
    """More work is waiting than the engine accepts; try again later."""


class ClusterError(PgfastError, RuntimeError):
    """There is no such Ray cluster, no room in it, or what was started there failed."""
