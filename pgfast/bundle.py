"""The bundle: a directory with a manifest (`pgfast.json`), a tokenizer and ONNX graphs.

The manifest is the only source of numbers: the runtime has no architectural defaults, and what is not in it is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pgfast.errors import BundleError

MANIFEST = "pgfast.json"
TOKENIZER = "tokenizer.json"
FORMAT_VERSION = 1
HASH_AT_LOAD = 64 * 2**20
"""Files up to this many bytes are hashed at every load, larger ones by `pgfast inspect --check`."""
FAMILIES, PRECISIONS, TARGETS = ("paligemma", "paligemma2"), ("fp32", "fp16"), ("cpu", "cuda", "tensorrt")
DIALECTS, RESAMPLING = ("ort", "standard"), ("bicubic", "bilinear")


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of the model."""

    num_image_tokens: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How a picture becomes `pixel_values`."""

    size: int
    """Side in pixels; pictures are squashed to a square."""
    mean: list[float]
    std: list[float]
    rescale_factor: float
    resampling: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids the runtime itself needs."""

    bos: int
    eos: int
    pad: int
    image: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Most tokens per answer; together with the image tokens they size the cache."""

    prompt_tokens: int
    """`<bos>`, text and newline."""
    new_tokens: int


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One ONNX graph; inputs and outputs as `name: type[dims]`."""

    file: str
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as it was written."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights come from."""

    checkpoint: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `pgfast.json`."""

    format_version: int
    family: str
    precision: str
    target: str
    dialect: str
    dimensions: Dimensions
    image: ImageSpec
    tokens: TokenIds
    prompts: dict[str, str]
    """Templates by task; `{text}` and `{language}` are filled in."""
    limits: Limits
    graphs: dict[str, GraphSpec]
    files: dict[str, FileEntry]
    source: Source
    exporter: str
    """Name and version of the program that wrote the bundle."""
    parity: dict[str, Any] | None = None
    """Report of `pgfast export --verify`."""

    @property
    def cache_length(self) -> int:
        """T: key/value slots that the longest answer needs."""
        return self.dimensions.num_image_tokens + self.limits.prompt_tokens + self.limits.new_tokens

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check.

        Raises:
            BundleError: Not JSON, a newer format, a missing or unknown key, or a value that makes no sense.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise BundleError(f"{MANIFEST} is not a JSON object")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            hint = "upgrade pgfast" if isinstance(version, int) and version > FORMAT_VERSION else "export the checkpoint again"
            raise BundleError(f"{MANIFEST} has format version {version!r}, this pgfast reads {FORMAT_VERSION}: {hint}")
        manifest = _parse(cls, raw, "")
        _check(manifest)
        return manifest


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
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a bundle directory: make one with 'pgfast export CHECKPOINT {folder}'")
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise BundleError(f"{folder} has no {MANIFEST}: it is not a bundle, or its export was interrupted") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{folder / MANIFEST} cannot be read: {error}") from error
        manifest = Manifest.from_json(text)
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry, full_check)
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


def _check_file(folder: Path, name: str, entry: FileEntry, full_check: bool) -> None:
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{name} is missing from the bundle {folder}")
    if path.resolve().parent != folder.resolve():
        raise BundleError(f"{name} leads out of the bundle {folder}")
    size = path.stat().st_size
    if size != entry.size:
        raise BundleError(f"{name} has {size} bytes where the manifest says {entry.size}: copy or export the bundle again")
    if (full_check or size <= HASH_AT_LOAD) and sha256_of(path) != entry.sha256:
        raise BundleError(f"{name} was changed after the export (its hash differs): copy or export the bundle again")


def _check(m: Manifest) -> None:
    """Refuse values that no exporter writes."""
    for what, value, allowed in (
        ("family", m.family, FAMILIES),
        ("precision", m.precision, PRECISIONS),
        ("target", m.target, TARGETS),
        ("dialect", m.dialect, DIALECTS),
        ("image.resampling", m.image.resampling, RESAMPLING),
    ):
        if value not in allowed:
            raise BundleError(f"{MANIFEST}: {what} is {value!r}, this pgfast knows {', '.join(allowed)}")
    for part in (m.dimensions, m.limits):
        for field in dataclasses.fields(part):
            if not 0 < getattr(part, field.name) < 2**31:
                raise BundleError(f"{MANIFEST}: {field.name} is {getattr(part, field.name)}")
    if not 0 < m.image.size <= 4096 or len(m.image.mean) != 3 or len(m.image.std) != 3 or 0 in m.image.std:
        raise BundleError(f"{MANIFEST}: the image section makes no sense")
    if any(not 0 <= id < m.dimensions.vocab_size for id in (m.tokens.bos, m.tokens.eos, m.tokens.pad)):
        raise BundleError(f"{MANIFEST}: a token id is outside the vocabulary")
    if m.cache_length > m.dimensions.max_position_embeddings:
        raise BundleError(f"{MANIFEST}: the limits exceed the model's {m.dimensions.max_position_embeddings} positions")
    if "answer" not in m.prompts:
        raise BundleError(f"{MANIFEST}: prompts has no template for 'answer'")
    for graph in ("vision_encoder", "decoder"):
        if graph not in m.graphs:
            raise BundleError(f"{MANIFEST}: graphs has no {graph}")
    for name in (TOKENIZER, *(graph.file for graph in m.graphs.values())):
        if name not in m.files:
            raise BundleError(f"{MANIFEST}: files does not list {name}")
    for name in m.files:
        if Path(name).name != name or "\\" in name or name in ("", ".", "..", MANIFEST):
            raise BundleError(f"{MANIFEST}: {name!r} is not the name of a file inside the bundle")


T = TypeVar("T")


def _parse(kind: type[T], value: Any, where: str) -> T:
    """Build a value of the annotated type from JSON, strictly: no missing or unknown keys, no conversions."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return typing.cast(T, _parse_dataclass(kind, value, where))
    if origin is types.UnionType:
        if value is None:
            return typing.cast(T, None)
        return typing.cast(T, _parse(args[0], value, where))
    if origin is dict and isinstance(value, dict):
        return typing.cast(T, {key: _parse(args[1], item, f"{where}.{key}") for key, item in value.items()})
    if origin is list and isinstance(value, list):
        return typing.cast(T, [_parse(args[0], item, where) for item in value])
    if kind is Any:
        return typing.cast(T, value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return typing.cast(T, float(value))
    if origin is None and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise BundleError(f"{MANIFEST}: {where.lstrip('.')} is not a {getattr(kind, '__name__', kind)}")


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{MANIFEST}: {where.lstrip('.')} is not an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(value) - set(fields)):
        raise BundleError(f"{MANIFEST}: {where.lstrip('.') or 'the manifest'} has the unknown key {unknown[0]!r}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(value)):
        raise BundleError(f"{MANIFEST}: {'.'.join([*where.lstrip('.').split('.'), missing[0]]).lstrip('.')} is missing")
    return kind(**{name: _parse(hints[name], item, f"{where}.{name}") for name, item in value.items()})
