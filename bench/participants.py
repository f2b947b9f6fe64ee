"""Who takes part: pgfast with every bundle, and the peers that are installed and have what they need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgfast.bundle import Bundle
from pgfast.errors import InputError

from .contenders import Spec
from .contenders.registry import missing
from .contenders.stock_onnx import GRAPHS
from .settings import Settings


@dataclass(frozen=True, slots=True)
class Peer:
    """What a user would pick instead."""

    kind: str
    precision: str
    bytes_per_stored: float
    """Memory per byte on disk, before the first start has measured it; a bf16 checkpoint grows twofold in fp32."""
    gpu_only: bool = False


PEERS = {
    "transformers fp32": Peer("transformers", "fp32", 2.1),
    "transformers bf16": Peer("transformers", "bf16", 1.1),
    "transformers bf16 compiled": Peer("transformers", "bf16-compiled", 1.1, gpu_only=True),
    "onnx fp32": Peer("onnx", "fp32", 1.1),
    "openvino fp32": Peer("openvino", "fp32", 1.1),
}
OVERHEAD = 5 * 10**8
"""Python, libraries and activations."""


@dataclass(slots=True)
class Entry:
    """A contender that takes part."""

    spec: Spec
    files: list[Path]
    memory: int
    """Bytes it is expected to take."""
    bundle: Bundle | None = None
    accuracy: dict[str, Any] | None = None

    def read_files(self) -> None:
        """Bring the files into the page cache, so that every start finds the same."""
        for path in self.files:
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass

    def observe(self, anonymous: int | None) -> None:
        """Replace the guess by what a start took, and a tenth more for larger batches.

        Mapped files count once, as large as they are: the system drops the pages that nobody reads any more.
        """
        if anonymous:
            self.memory = round(max(anonymous, self.file_bytes) * 1.1) + OVERHEAD

    @property
    def file_bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files)

    def describe(self) -> dict[str, Any]:
        """What the result file says about it."""
        about: dict[str, Any] = {
            "name": self.spec.name,
            "kind": self.spec.kind,
            "precision": self.spec.precision,
            "ours": self.spec.ours,
            "file_bytes": self.file_bytes,
        }
        if self.bundle is not None:
            m = self.bundle.manifest
            sizes = {graph: _graph_bytes(self.bundle, graph) for graph in m.graphs}
            about["bundle"] = {
                "name": self.bundle.folder.name,
                "digest": m.digest(),
                "vision_precision": m.vision_precision,
                "graph_bytes": sizes,
                "exporter": m.exporter,
                "parity": m.parity,
                "accuracy": self.accuracy,
            }
        return about


def _graph_bytes(bundle: Bundle, graph: str) -> int:
    file = bundle.manifest.graphs[graph].file
    return sum(entry.size for name, entry in bundle.manifest.files.items() if name in (file, f"{file}.data"))


def choose(settings: Settings, bundles: Sequence[Bundle]) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Return the contenders, and the peers that cannot take part with a line each that says why.

    Raises:
        InputError: A peer is unknown, or the bundles are of different models.
    """
    if unknown := set(settings.peers) - set(PEERS):
        raise InputError(f"unknown peer {min(unknown)!r}: choose from {', '.join(PEERS)}")
    first = bundles[0].manifest
    if any((m.dimensions, m.image.size) != (first.dimensions, first.image.size) for m in (b.manifest for b in bundles)):
        raise InputError("the bundles are of different models: measure each model in a run of its own")
    entries = [_ours(settings, bundle, bundles) for bundle in bundles]
    skipped = []
    for name in settings.peers:
        peer = PEERS[name]
        files, reason = _files(settings, peer)
        if reason is not None:
            skipped.append({"contender": name, "workload": None, "reason": reason})
            continue
        folder = settings.checkpoint if peer.kind == "transformers" else settings.stock
        spec = Spec(name, peer.kind, str(folder), str(bundles[0].folder), peer.precision, settings.threads, settings.provider)
        stored = sum(path.stat().st_size for path in files)
        entries.append(Entry(spec, files, round(stored * peer.bytes_per_stored) + OVERHEAD))
    return entries, skipped


def _ours(settings: Settings, bundle: Bundle, bundles: Sequence[Bundle]) -> Entry:
    m = bundle.manifest
    first = next(other for other in bundles if other.manifest.precision == m.precision)
    name = f"pgfast {m.precision}" + ("" if bundle is first else f" ({bundle.folder.name})")
    folder = str(bundle.folder)
    files = [bundle.path(file) for file in m.files]
    memory = round(sum(path.stat().st_size for path in files) * 1.5) + OVERHEAD
    accuracy = settings.accuracy.get(m.digest())
    return Entry(
        Spec(name, "pgfast", folder, folder, m.precision, settings.threads, settings.provider), files, memory, bundle, accuracy
    )


def _files(settings: Settings, peer: Peer) -> tuple[list[Path], str | None]:
    """Files of a peer, or why it cannot take part."""
    if (reason := missing(peer.kind)) is not None:
        return [], reason
    if peer.gpu_only and settings.provider == "cpu":
        return [], "compiled generation is measured on a GPU only"
    if peer.kind == "openvino" and settings.provider != "cpu":
        return [], "measured on the CPU only"
    if peer.kind == "transformers":
        folder = settings.checkpoint
        return ([], "no checkpoint given") if folder is None else (sorted(folder.glob("*.safetensors")), None)
    if settings.stock is None:
        return [], "no stock ONNX export given (pgfast export CHECKPOINT OUT --layout transformers.js makes one)"
    paths = [settings.stock / "onnx" / f"{graph}.onnx{tail}" for graph in GRAPHS for tail in ("", "_data")]
    absent = [path for path in paths if not path.is_file()]
    return (paths, None) if not absent else ([], f"{absent[0]} is missing: export it in fp32")


def read_accuracy(path: Path | None) -> Mapping[str, Any]:
    """Read the output of `pgfast bench accuracy --json`, by bundle digest.

    Raises:
        InputError: The file is something else.
    """
    if path is None:
        return {}
    try:
        return {row["digest"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the output of 'pgfast bench accuracy --json': {error!r}") from error
