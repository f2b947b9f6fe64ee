"""The manifest (`pgfast.json`): every number of a bundle.

The runtime has no architectural defaults of its own: what is not in the manifest is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgfast.errors import BundleError
from pgfast.strict_json import parse, refuse_constant

MANIFEST = "pgfast.json"
TOKENIZER = "tokenizer.json"
FORMAT_VERSION = 3
"""2: int8 weights within 64; those of version 1 would saturate on x86 without VNNI. 3: several pictures, languages, masks."""
FAMILIES, PRECISIONS, TARGETS = (
    ("paligemma", "paligemma2"),
    ("fp32", "fp16", "bf16", "int8", "int4"),
    ("cpu", "cuda", "tensorrt", "tensorrt-rtx"),
)
CACHE_TYPES = {
    "fp32": ("float32",),
    "fp16": ("float16",),
    "bf16": ("bfloat16",),
    "int8": ("float32", "float16"),
    "int4": ("float32", "float16"),
}
"""What activations and cache can be beside weights of a precision."""
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
    images: int
    """Pictures in front of one prompt."""


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One ONNX graph; inputs and outputs as `name: type[dims]`."""

    file: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    weights: dict[str, str] | None = None
    """decoder_step: where its initializers lie in the decoder's data file, `name: type[dims]@offset`."""


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
    adapter: str | None = None
    """LoRA adapter that was merged into it."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `pgfast eval --calibrate` found out about the confidence of answers."""

    temperature: float
    ece_before: float
    """Expected calibration error of the plain confidence, on questions that the temperature was not fitted to."""
    ece_after: float
    """With the temperature, on the same questions."""
    questions: int
    """How many those were."""


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """A graph that TensorRT-RTX compiled ahead of time for one kind of GPU."""

    file: str
    graph: str
    compute_capability: str
    builder: str
    """Version of TensorRT-RTX."""
    built_from: str
    """`Manifest.graph_digest` at that time."""
    max_batch: int


def engine_file(graph: str, compute_capability: str) -> str:
    """Name of an engine's file, for example `decoder.sm89.engine`."""
    return f"{graph}.sm{compute_capability.replace('.', '')}.engine"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `pgfast.json`."""

    format_version: int
    family: str
    precision: str
    vision_precision: str
    target: str
    dialect: str
    dimensions: Dimensions
    image: ImageSpec
    tokens: TokenIds
    prompts: dict[str, str]
    """Templates by task; `{text}` and `{language}` are filled in."""
    languages: list[str]
    """Codes that the model was trained with."""
    limits: Limits
    graphs: dict[str, GraphSpec]
    files: dict[str, FileEntry]
    source: Source
    exporter: str
    """Name and version of the program that wrote the bundle."""
    parity: dict[str, Any] | None = None
    """Report of `pgfast export --verify`."""
    calibration: Calibration | None = None
    engines: list[EngineEntry] = dataclasses.field(default_factory=list)

    @property
    def cache_length(self) -> int:
        """T: key/value slots that the longest answer needs."""
        limits = self.limits
        return limits.images * self.dimensions.num_image_tokens + limits.prompt_tokens + limits.new_tokens

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def cache_type(self) -> str:
        """float32, float16 or bfloat16: type of the decoder's activations and cache."""
        return self.graphs["decoder"].inputs["past_key_values.0.key"].split("[")[0]

    def digest(self) -> str:
        """Hash of all files' hashes: tells bundles apart."""
        return hashlib.sha256(
            "".join(f"{name}{entry.sha256}" for name, entry in sorted(self.files.items())).encode()
        ).hexdigest()

    def graph_digest(self, graph: str) -> str:
        """Hash of the hashes of a graph and of its weights: what an engine is built from."""
        names = (self.graphs[graph].file, f"{self.graphs[graph].file}.data")
        return hashlib.sha256("".join(self.files[name].sha256 for name in names if name in self.files).encode()).hexdigest()

    def engines_of_other_graphs(self) -> list[EngineEntry]:
        """Engines that do not belong to the graphs and weights beside them."""
        return [engine for engine in self.engines if engine.built_from != self.graph_digest(engine.graph)]

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check.

        Raises:
            BundleError: Not JSON, a newer format, a missing or unknown key, or a value that makes no sense.
        """
        try:
            raw = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise BundleError(f"{MANIFEST} is not a JSON object")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            hint = "upgrade pgfast" if isinstance(version, int) and version > FORMAT_VERSION else "export the checkpoint again"
            raise BundleError(f"{MANIFEST} has format version {version!r:.100}, this pgfast reads {FORMAT_VERSION}: {hint}")
        try:
            manifest = parse(cls, raw)
        except ValueError as error:
            raise BundleError(f"{MANIFEST}: {error}") from error
        _check_files(manifest)  # first: later messages name files
        check_values(manifest)
        return manifest


def check_values(m: Manifest) -> None:
    """Refuse values that no exporter writes; the files are not looked at.

    Raises:
        BundleError: The message names the value.
    """
    for what, value, allowed in (
        ("family", m.family, FAMILIES),
        ("precision", m.precision, PRECISIONS),
        ("vision_precision", m.vision_precision, PRECISIONS),
        ("target", m.target, TARGETS),
        ("dialect", m.dialect, DIALECTS),
        ("image.resampling", m.image.resampling, RESAMPLING),
    ):
        if value not in allowed:
            raise BundleError(f"{MANIFEST}: {what} is {value!r:.100}, this pgfast knows {', '.join(allowed)}")
    for part in (m.dimensions, m.limits):
        for field in dataclasses.fields(part):
            if not 0 < getattr(part, field.name) < (1000 if field.name == "num_hidden_layers" else 2**24):
                raise BundleError(f"{MANIFEST}: {field.name} is {getattr(part, field.name)}")
    shape = (0 < m.image.size <= 4096, len(m.image.mean), len(m.image.std))
    numbers = all(1e-6 < number < 1e6 for number in (m.image.rescale_factor, *m.image.std))
    if shape != (True, 3, 3) or not numbers or not all(abs(number) < 1e6 for number in m.image.mean):
        raise BundleError(f"{MANIFEST}: the image section makes no sense")
    if any(not 0 <= id < m.dimensions.vocab_size for id in (m.tokens.bos, m.tokens.eos, m.tokens.pad)):
        raise BundleError(f"{MANIFEST}: a token id is outside the vocabulary")
    if m.cache_length > m.dimensions.max_position_embeddings:
        raise BundleError(f"{MANIFEST}: the limits exceed the model's {m.dimensions.max_position_embeddings} positions")
    if "{text}" not in m.prompts.get("answer", ""):
        raise BundleError(f"{MANIFEST}: prompts has no template for 'answer' with {{text}} in it")
    if not m.languages or not all(re.fullmatch(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*", code) for code in m.languages):
        raise BundleError(f"{MANIFEST}: languages is a list of codes such as 'en'")
    if m.calibration is not None and not 0.01 <= m.calibration.temperature <= 100:
        raise BundleError(f"{MANIFEST}: the calibration's temperature is {m.calibration.temperature}")
    if any(not isinstance(value, str | int | float | None) for value in (m.parity or {}).values()):
        raise BundleError(f"{MANIFEST}: parity is a flat list of figures")
    check_interface(m)


def _check_files(m: Manifest) -> None:
    """Refuse lists of files that leave out what is needed or name what is not in the bundle."""
    for name in (TOKENIZER, *(graph.file for graph in m.graphs.values())):
        if name not in m.files:
            raise BundleError(f"{MANIFEST}: files does not list {name!r:.100}")
    for engine in m.engines:
        named = re.fullmatch(r"\d+\.\d", engine.compute_capability) and engine.graph in m.graphs
        if not named or engine.file != engine_file(engine.graph, engine.compute_capability):
            raise BundleError(f"{MANIFEST}: {engine.file!r:.100} is not the name of an engine of this bundle")
        if not re.fullmatch(r"[\w.+-]{1,40}", engine.builder):
            raise BundleError(f"{MANIFEST}: {engine.builder!r:.100} is not a version of an engine's builder")
        if engine.file not in m.files:
            raise BundleError(f"{MANIFEST}: files does not list {engine.file}")
    for name in m.files:
        if Path(name).name != name or "\\" in name or name in ("", ".", "..", MANIFEST):
            raise BundleError(f"{MANIFEST}: {name!r} is not the name of a file inside the bundle")


def check_interface(m: Manifest) -> None:
    """Compare the graphs' inputs and outputs, which every session is held to, with the dimensions."""
    d, image = m.dimensions, f"float32[B, 3, {m.image.size}, {m.image.size}]"
    if set(m.graphs) - {"decoder_step", "mask_decoder"} != {"vision_encoder", "decoder"}:
        raise BundleError(f"{MANIFEST}: graphs must be vision_encoder and decoder, and perhaps decoder_step and mask_decoder")
    decoder = m.graphs["decoder"]
    cache = decoder.inputs.get("past_key_values.0.key", "")
    dtype, slots = cache.split("[")[0], m.cache_length if m.dialect == "standard" else "T"
    shape = f"{dtype}[B, {d.num_key_value_heads}, {slots}, {d.head_dim}]"
    names = [f"{layer}.{part}" for layer in range(d.num_hidden_layers) for part in ("key", "value")]
    integers = {"write_indices": "int64[B]", "kv_lengths": "int64[B]"}
    # numpy has no bfloat16: the features between the graphs are float32 then
    features = f"{'float32' if dtype == 'bfloat16' else dtype}[B, %s, {d.hidden_size}]"
    inputs = {"input_ids": "int64[B, S]", "image_features": features % "P"} | integers
    outputs = {"logits": f"float32[B, {d.vocab_size}]", "next_token": "int64[B, 1]", "next_token_logprob": "float32[B, 1]"}
    interfaces = [
        (m.graphs["vision_encoder"], {"pixel_values": image}, {"image_features": features % d.num_image_tokens}),
        (
            decoder,
            inputs | {f"past_key_values.{name}": shape for name in names},
            outputs | {f"present.{name}": shape for name in names},
        ),
    ]
    if "decoder_step" in m.graphs:
        shape = f"{dtype}[B, {d.num_key_value_heads}, {m.cache_length}, {d.head_dim}]"
        inputs = {"input_ids": "int64[B, 1]", "last_index": "int32[B]"}
        interfaces.append(
            (
                m.graphs["decoder_step"],
                inputs | {f"past_key_values.{name}": shape for name in names},
                outputs | {"next_index": "int32[B]"} | {f"present.{name}": shape for name in names},
            )
        )
    if "mask_decoder" in m.graphs:
        interfaces.append((m.graphs["mask_decoder"], {"codes": "int64[N, 16]"}, {"mask": "float32[N, 64, 64]"}))
    for graph, wanted_inputs, wanted_outputs in interfaces:
        for found, wanted in ((graph.inputs, wanted_inputs), (graph.outputs, wanted_outputs)):
            if found != wanted:
                name = min(name for name, _ in set(found.items()) ^ set(wanted.items()))
                raise BundleError(f"{MANIFEST}: {graph.file}'s {name} does not fit the dimensions")
    if dtype not in CACHE_TYPES[m.precision]:
        raise BundleError(f"{MANIFEST}: the cache is {dtype or 'missing'}, which does not fit precision {m.precision}")
