"""Where a checkpoint is: a local folder, or a Hugging Face Hub id that is downloaded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgfast.errors import ExportError, InputError, MissingDependencyError
from pgfast.manifest import ImageSpec

DEFAULT_TEMPLATE = "answer {language} {text}"
"""Prompt of a question in PaliGemma's pretraining (big_vision, configs/proj/paligemma/README.md)."""
PROMPTS_FILE = "pgfast_prompts.json"
"""In a checkpoint or adapter: the templates it was fine-tuned with, as a bundle's manifest has them."""
_FILES = ["*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", PROMPTS_FILE]
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which Hugging Face writes."""


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """A checkpoint on disk."""

    path: Path
    name: str
    """What the user called it."""
    revision: str | None
    """Commit on the Hub, or None for a local folder."""


def locate(checkpoint: str) -> CheckpointFolder:
    """Find a checkpoint, downloading it if it is not a local folder.

    Raises:
        ExportError: No such folder, and not a Hub id that can be had.
    """
    try:
        path = Path(checkpoint).expanduser()
        if path.is_dir():
            return CheckpointFolder(path, path.resolve().name, None)
        if path.exists():
            raise ExportError(f"{checkpoint} is a file: give the checkpoint's folder")
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, an unknown ~user, a null byte
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{checkpoint[:80]} is not a folder: {error}") from error
    if checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        raise ExportError(f"{checkpoint} is neither a folder nor a Hub id such as google/paligemma-3b-ft-vqav2-224")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError("huggingface-hub", "export") from error
    try:
        downloaded = Path(snapshot_download(checkpoint, allow_patterns=_FILES))
    except HFValidationError as error:
        raise ExportError(f"{checkpoint} is neither a folder nor a Hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"{checkpoint} cannot be downloaded ({reason}): for a gated model accept its licence and run 'hf auth login'; "
            f"without a network run 'hf download {checkpoint} --local-dir DIR' where there is one and export that folder"
        ) from error
    return CheckpointFolder(downloaded, checkpoint, downloaded.name)


def read_answer_template(folders: Sequence[Path], given: str | None) -> str:
    """Find the prompt template of a checkpoint's questions: its own file, what was given, or the default.

    Args:
        folders: An adapter's folder before that of its checkpoint; the first one with the file counts.
        given: What the user asked for.

    Raises:
        InputError: The file or the template cannot be used, or they contradict each other.
    """
    path = next((folder / PROMPTS_FILE for folder in folders if (folder / PROMPTS_FILE).exists()), None)
    own = None
    if path is not None:
        try:
            own = json.loads(path.read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f'{path} is not of the form {{"answer": "answer {{language}} {{text}}"}}: {error!r}') from error
    if own is not None and given is not None and own != given:
        raise InputError(
            f"the checkpoint was fine-tuned with the template {own!r} ({PROMPTS_FILE}): leave --answer-template out"
        )
    template = own if own is not None else DEFAULT_TEMPLATE if given is None else given
    if not isinstance(template, str) or "{text}" not in template:
        raise InputError(f"the answer template is {template!r}: {{text}} must stand where the question belongs")
    return template


def read_image_spec(folder: Path, image_size: int) -> ImageSpec:
    """Read how pictures are prepared from `preprocessor_config.json` (or transformers 5's `processor_config.json`).

    Raises:
        ExportError: Neither file is there, or it asks for something the runtime does not do.
    """
    raw = read_json(folder / "preprocessor_config.json")
    if raw is None:
        processor = read_json(folder / "processor_config.json")
        raw = processor.get("image_processor") if isinstance(processor, dict) else None
    if not isinstance(raw, dict):
        raise ExportError(f"no preprocessor_config.json in {folder}: save the processor with the checkpoint")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if raw.get(step, True) is not True:
            raise ExportError(f"preprocessor_config.json has {step} off: only the full SigLIP preprocessing is supported")
    size = raw.get("size")
    if size != {"height": image_size, "width": image_size}:
        raise ExportError(f"preprocessor_config.json says size {size}, config.json says {image_size} x {image_size}")
    resample = raw.get("resample", 3)
    if not isinstance(resample, int) or resample not in _RESAMPLING:
        raise ExportError(f"preprocessor_config.json says resample {resample!r}: only bicubic (3) and bilinear (2) are known")
    try:
        mean, std = ([_finite(x) for x in raw[key]] for key in ("image_mean", "image_std"))
        factor = _finite(raw.get("rescale_factor", 1 / 255))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ExportError(f"preprocessor_config.json: image_mean, image_std or rescale_factor is unusable ({error})") from error
    return ImageSpec(image_size, mean, std, factor, _RESAMPLING[resample])


def _finite(value: Any) -> float:
    if isinstance(value, str | bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def read_json(path: Path) -> Any:
    """Parse a file; None if there is none, ExportError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path.name} cannot be read: {error}") from error
