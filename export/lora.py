"""A LoRA adapter of PEFT, added to the checkpoint's weights as they are read: W + scaling * B @ A, in fp32."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgfast.errors import ExportError

from .tensors import Array, Checkpoint, canonical_name
from .weights import EMBEDDING, HEAD

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_WAY_OUT = "merge it with PEFT's merge_and_unload() and export the checkpoint that gives"
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that keep the base weights; pissa, olora, corda, loftq and lora_ga change them first."""
_READ = {"peft_type", "bias", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
_HARMLESS = {
    # where the adapter comes from
    *("base_model_name_or_path", "auto_mapping", "peft_version", "revision", "task_type"),
    # which layers were adapted: the tensors themselves say it
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # training, and settings of what is refused by another key
    *("inference_mode", "lora_dropout", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
}
"""Keys that do not change the merged weights; any other key may only be empty or off."""


@dataclass(frozen=True, slots=True)
class _Config:
    """What of `adapter_config.json` the merge needs."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool

    def rank_of(self, module: str) -> int:
        """Rank of one layer's matrices."""
        key = _first_match(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling_of(self, module: str) -> float:
        """Factor of one layer's update."""
        key, rank = _first_match(self.alpha_pattern, module), self.rank_of(module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True, slots=True)
class _Update:
    """The update of one tensor of the checkpoint."""

    a: str
    """Name of A, [rank, in], in the adapter's file."""
    b: str
    """Name of B, [out, rank]."""
    scaling: float


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with an adapter merged into it.

    Only headers are kept: the two small matrices of a tensor are read with it, and the update is made for the rows at hand.

    Args:
        folder: The checkpoint.
        adapter: What PEFT's `save_pretrained` wrote.

    Raises:
        ExportError: The adapter does something that is not supported, is damaged, or belongs to another model.
        WeightMismatchError: A tensor is stored twice.
    """

    def __init__(self, folder: Path, adapter: Path) -> None:
        super().__init__(folder)
        config = _read_config(adapter)
        if not (adapter / WEIGHTS).is_file():
            pickle = (adapter / "adapter_model.bin").exists()
            hint = ": adapter_model.bin is a pickle, load and save it with PEFT" if pickle else ""
            raise ExportError(f"no {WEIGHTS} in {adapter}{hint}")
        self._adapter = Checkpoint(adapter / WEIGHTS)
        self._updates = _match(config, self._adapter, self)
        for name in sorted(self._adapter.names()):
            for _ in self._adapter.pieces(name):  # small enough to be looked through for NaN before the work starts
                pass

    def adapted(self) -> set[str]:
        """Canonical names of the tensors that the adapter changes."""
        return set(self._updates)

    def pieces(self, name: str) -> Iterator[Array]:
        """Read a tensor as `Checkpoint.pieces` does, with the adapter's update added."""
        update = self._updates.get(name)
        if update is None:
            yield from super().pieces(name)
            return
        a = self._adapter.read(update.a)
        b = self._adapter.read(update.b) * np.float32(update.scaling)
        first = 0
        for piece in super().pieces(name):
            with np.errstate(over="ignore", invalid="ignore"):
                piece += b[first : first + len(piece)] @ a
            if piece.size and not (np.isfinite(piece.min()) and np.isfinite(piece.max())):
                raise ExportError(f"{name} is beyond fp32's range after the adapter's update")
            first += len(piece)
            yield piece


def _match(config: _Config, adapter: Checkpoint, base: Checkpoint) -> dict[str, _Update]:
    """Find the tensor that each pair of matrices changes, by canonical name; nothing of the adapter may be left over."""
    pairs: dict[str, dict[str, str]] = {}
    for name in sorted(adapter.names()):
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise ExportError(f"{name} in {WEIGHTS} is not supported: only lora_A and lora_B of linear layers are; {_WAY_OUT}")
        adapter.check_dtype(name)
        pairs.setdefault(found["module"], {})[found["part"]] = name
    if not pairs:
        raise ExportError(f"{WEIGHTS} holds no tensors")
    for what, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not any(_first_match({key: 0}, module) for module in pairs):
                raise ExportError(f"{CONFIG}: the key {key!r} of {what} matches no layer in {WEIGHTS}")
    updates: dict[str, _Update] = {}
    for module, pair in pairs.items():
        target = canonical_name(f"{module}.weight")
        if target in updates:
            raise ExportError(f"{WEIGHTS} holds two updates of {target}, one for {module}")
        _check_pair(module, target, pair, config.rank_of(module), adapter, base)
        updates[target] = _Update(pair["A"], pair["B"], config.scaling_of(module))
    return updates


def _check_pair(module: str, target: str, pair: dict[str, str], rank: int, adapter: Checkpoint, base: Checkpoint) -> None:
    """Compare two matrices with the tensor that they change and with the configured rank."""
    if missing := {"A", "B"} - set(pair):
        raise ExportError(f"{next(iter(pair.values()))} has no lora_{missing.pop()} beside it in {WEIGHTS}")
    if target in (EMBEDDING, HEAD):
        raise ExportError(f"{pair['A']}: LoRA on the embedding or the vocabulary head is not supported; {_WAY_OUT}")
    if target not in base.names():
        raise ExportError(f"{pair['A']} fits no tensor of the checkpoint: the adapter belongs to another model")
    a, b, weight = adapter.shape(pair["A"]), adapter.shape(pair["B"]), base.shape(target)
    if len(weight) != 2:
        raise ExportError(f"{pair['A']}: LoRA on {target} of shape {list(weight)} is not supported; {_WAY_OUT}")
    if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != weight:
        raise ExportError(
            f"{module}: lora_A {list(a)} and lora_B {list(b)} do not fit the checkpoint's {list(weight)}: "
            "the adapter belongs to another model"
        )
    if (a[0], b[1]) != (rank, rank):
        raise ExportError(f"{module}: lora_A {list(a)} and lora_B {list(b)} do not have the rank {rank} of {CONFIG}")


def _read_config(adapter: Path) -> _Config:
    """Read `adapter_config.json` strictly: a key that could change the function must be known or off."""
    path = adapter / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"no {CONFIG} in {adapter}: give the folder that PEFT's save_pretrained wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ExportError(f"{CONFIG} is not a JSON object")
    if raw.get("peft_type") != "LORA":
        raise ExportError(f"{CONFIG}: peft_type {raw.get('peft_type')!r} is not supported, only 'LORA' is; {_WAY_OUT}")
    if raw.get("bias", "none") != "none":
        raise ExportError(f"{CONFIG}: bias {raw['bias']!r} is not supported, only 'none' is; {_WAY_OUT}")
    if (init := raw.get("init_lora_weights", True)) not in _KEEPS_BASE:
        raise ExportError(
            f"{CONFIG}: init_lora_weights {init!r} is not supported, it changes the base weights: "
            "save the adapter with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    for key, value in raw.items():
        if key not in _READ | _HARMLESS and value not in (None, False, [], {}):
            raise ExportError(f"{CONFIG}: {key} {str(value)[:80]!r} is not supported; {_WAY_OUT}")
    if not isinstance(rslora := raw.get("use_rslora", False), bool):
        raise ExportError(f"{CONFIG}: use_rslora is {rslora!r}")
    return _Config(
        rank=_rank(raw.get("r"), "r"),
        alpha=_alpha(raw.get("lora_alpha"), "lora_alpha"),
        rank_pattern={key: _rank(value, key) for key, value in _pattern(raw, "rank_pattern").items()},
        alpha_pattern={key: _alpha(value, key) for key, value in _pattern(raw, "alpha_pattern").items()},
        rslora=rslora,
    )


def _rank(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ExportError(f"{CONFIG}: {key} is {value!r}, not a rank")
    return value


def _alpha(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ExportError(f"{CONFIG}: {key} is {value!r}, not a number")
    return float(value)


def _pattern(raw: dict[str, Any], what: str) -> dict[str, Any]:
    """Return rank_pattern or alpha_pattern, whose keys are ends of module names or regular expressions for them."""
    pattern = raw.get(what) or {}
    if not isinstance(pattern, dict):
        raise ExportError(f"{CONFIG}: {what} is not an object")
    for key in pattern:
        try:
            re.compile(_regex(key))
        except (re.error, OverflowError, RecursionError) as error:
            raise ExportError(f"{CONFIG}: the key {key!r} of {what} is no regular expression: {error}") from error
    return pattern


def _regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _first_match(pattern: dict[str, Any], module: str) -> str | None:
    """Return the key that PEFT takes for a module (peft.utils.other.get_pattern_key): the first one that matches."""
    return next((key for key in pattern if re.match(_regex(key), module)), None)
