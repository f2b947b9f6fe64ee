"""What an export will write, worked out and checked before the first byte is written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

import pgfast
from pgfast.errors import BundleError, ExportError, PgfastError
from pgfast.manifest import FORMAT_VERSION, TOKENIZER, Dimensions, Limits, Manifest, Source, TokenIds, check_values
from pgfast.prompt import Tokenizer, fill_template

from . import graphs, weights
from .checkpoint import DEFAULT_TEMPLATE, CheckpointFolder, locate, read_answer_template, read_image_spec
from .config import PaliGemmaConfig, read_config
from .layers import Dialect
from .lora import AdaptedCheckpoint
from .precision import Precision, check_words, choose, dialect_of
from .tensors import Checkpoint

PROMPTS = {
    "answer": DEFAULT_TEMPLATE,
    "cap": "cap {language}",
    "caption": "caption {language}",
    "describe": "describe {language}",
    "ocr": "ocr",
    "question": "question {language} {text}",
    "detect": "detect {text}",
    "segment": "segment {text}",
}
"""The prefixes PaliGemma was pretrained with (ai.google.dev/gemma/docs/paligemma/prompt-system-instructions)."""
# fmt: off
LANGUAGES = (
    "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi", "hr", "hu", "id", "it",
    "ja", "ko", "mi", "nl", "no", "pl", "pt", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh",
)
# fmt: on
"""The model card's 34 languages and English (big_vision, configs/proj/paligemma/transfers/coco35l.py)."""
TEXT_TOKENS = 128
"""Most prompt tokens, and most new tokens: the text length of PaliGemma's pretraining."""
IMAGES = 8
"""Most pictures of a prompt on the CPU, where room that is not used costs no memory; elsewhere it is 1 unless asked for."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to write."""

    precision: str = "fp32"
    target: str = "cpu"
    vision_precision: str | None = None
    """None: the default beside this precision (`precision.choose`)."""
    answer_template: str | None = None
    """Prompt of a question; None: what the checkpoint's `pgfast_prompts.json` says, or PaliGemma's own."""
    verify: bool = False
    """Compare the bundle with transformers before it gets its name."""
    verify_data: Path | None = None
    """JSON lines of pictures and questions to compare on; None: built-in ones."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to build engines for, for example 8.9; none: the usual ones. Only target tensorrt-rtx has engines."""
    adapter: Path | None = None
    """Folder of a PEFT LoRA adapter to merge."""
    block_size: int | None = None
    """Weights of a quantized matrix that share a scale; None: 32. More is smaller and faster, and less exact."""
    max_images: int | None = None
    """Pictures in front of one prompt; None: 8 on the CPU if the model has so many positions, elsewhere 1."""
    languages: tuple[str, ...] = LANGUAGES
    """Codes that prompts may name."""
    mask_decoder: Path | None = None
    """big_vision's `vae-oid.npz`, or one like it: the decoder of `segment`'s masks."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything an export needs."""

    source: CheckpointFolder
    config: PaliGemmaConfig
    tensors: Checkpoint
    manifest: Manifest
    """Complete but for the files."""
    graphs: dict[str, graphs.Graph]
    rows: dict[str, list[weights.Row]]
    """Where the initializers come from, by graph; a graph that is not here reads those of the decoder."""

    @property
    def total_bytes(self) -> int:
        """Size of all weights to write."""
        return sum(
            bytes_of(value)
            for graph in map(self.graphs.__getitem__, self.rows)
            for value in graph.parameters()
            if not graph.is_alias(value)
        )


def make_plan(checkpoint: str, options: ExportOptions) -> Plan:
    """Read headers and configuration, build the graphs, and compare them; no weight is read but a head's.

    Raises:
        ExportError: The checkpoint or an option cannot be used.
        WeightMismatchError: Tensors do not fit the config.
    """
    check_words(options.precision, options.vision_precision, options.target)
    source = locate(checkpoint)
    folders = [source.path] if options.adapter is None else [options.adapter, source.path]
    template = read_answer_template(folders, options.answer_template)
    config = read_config(source.path / "config.json")
    tensors = Checkpoint(source.path) if options.adapter is None else AdaptedCheckpoint(source.path, options.adapter)
    config = weights.settle_head(config, tensors)
    rows = {
        graphs.VISION_ENCODER: list(weights.vision_rows(config)),
        graphs.DECODER: list(weights.decoder_rows(config)),
    }
    weights.check_weights(tensors, [row for group in rows.values() for row in group], tied=config.text.tied)
    _check_tokenizer(source.path, config, template)
    precision = choose(options.precision, options.vision_precision, options.target, config.text, options.block_size)
    manifest = _manifest(config, options, source, precision, template)
    check_window(config.text.sliding_window, manifest.cache_length)
    p, dialect = precision, dialect_of(options.precision, options.target)
    built = {
        graphs.VISION_ENCODER: graphs.build_vision_encoder(
            config, p.vision_dtype, graphs.features_type(p.dtype), dialect, p.vision_storage
        ),
        graphs.DECODER: graphs.build_decoder(config, p.dtype, dialect, manifest.cache_length, p.storage, p.table_storage),
    }
    if options.target == "cuda" and dialect is Dialect.ORT:
        built[graphs.DECODER_STEP] = graphs.build_decoder_step(
            config, p.dtype, manifest.cache_length, p.storage, p.table_storage
        )
    specs = {name: graphs.graph_spec(graph, f"{name}.onnx") for name, graph in built.items()}
    manifest = dataclasses.replace(manifest, graphs=specs)
    try:
        check_values(manifest)
    except BundleError as error:
        raise ExportError(f"the checkpoint's configuration makes no sense: {error}") from error
    return Plan(source, config, tensors, manifest, built, rows)


GEMMA2_WINDOW = 4096
"""sliding_window of every published PaliGemma 2. The model was trained with full attention (big_vision has no window), and
transformers' acts only on decoding beyond it, which pictures of 896 pixels alone reach: full attention is right there too."""


def check_window(window: int | None, cache_length: int) -> None:
    """Refuse a sliding window that would change answers."""
    if window is not None and window < cache_length and window != GEMMA2_WINDOW:
        raise ExportError(f"sliding_window {window} is shorter than an answer can be: not supported")


def _manifest(
    config: PaliGemmaConfig, options: ExportOptions, source: CheckpointFolder, precision: Precision, template: str
) -> Manifest:
    """Everything but the graphs and the files, which are not written yet."""
    text, p = config.text, config.vision.num_image_tokens
    room = min(TEXT_TOKENS, (text.max_position_embeddings - p) // 2)
    return Manifest(
        format_version=FORMAT_VERSION,
        family="paligemma2" if text.model_type == "gemma2" else "paligemma",
        precision=options.precision,
        vision_precision=precision.vision,
        target=options.target,
        dialect=str(dialect_of(options.precision, options.target)),
        dimensions=Dimensions(
            num_image_tokens=p,
            **{f.name: getattr(text, f.name) for f in dataclasses.fields(Dimensions) if f.name != "num_image_tokens"},
        ),
        image=read_image_spec(source.path, config.vision.image_size),
        tokens=TokenIds(config.bos_token_id, config.eos_token_id, config.pad_token_id, config.image_token_id),
        prompts=PROMPTS | {"answer": template},
        languages=list(options.languages),
        limits=Limits(
            prompt_tokens=room, new_tokens=room, images=_max_images(options, p, text.max_position_embeddings - 2 * room)
        ),
        graphs={},
        files={},
        source=Source(source.name, source.revision, options.adapter.resolve().name if options.adapter else None),
        exporter=f"pgfast {pgfast.__version__}",
    )


def _max_images(options: ExportOptions, num_image_tokens: int, positions: int) -> int:
    """Return how many pictures a prompt may have, so that they leave room for the text."""
    most = max(1, positions // num_image_tokens)
    wanted = options.max_images
    if wanted is None:
        return min(IMAGES, most) if options.target == "cpu" else 1
    if not 1 <= wanted <= most:
        raise ExportError(
            f"--max-images {wanted}: the model's positions are enough for 1 to {most} pictures in front of a prompt"
        )
    if options.target == "tensorrt-rtx" and wanted > 1:
        raise ExportError("--max-images: engines for tensorrt-rtx are built for one picture")
    return wanted


def bytes_of(value: ir.Value) -> int:
    """Size of an initializer in its file."""
    shape, dtype = shape_and_type(value)
    return math.ceil(math.prod(shape) * dtype.bitwidth / 8)


def shape_and_type(value: ir.Value) -> tuple[tuple[int, ...], ir.DataType]:
    """Parameters always have both."""
    assert value.shape is not None
    assert value.dtype is not None
    return tuple(value.shape.numpy()), value.dtype


def _check_tokenizer(source: Path, config: PaliGemmaConfig, answer_template: str) -> None:
    """Make sure that the runtime will take the tokenizer and that it belongs to the weights."""
    path = source / TOKENIZER
    if not path.is_file():
        raise ExportError(f"no {TOKENIZER} in {source}: save the fast tokenizer with the checkpoint")
    try:
        tokenizer = Tokenizer(path, bos_id=config.bos_token_id)
        tokenizer.check_ids(config.text.vocab_size)
        prefix = fill_template(answer_template, text="", language="en").strip()
        tokenizer.encode_prompt(prefix or "?", max_tokens=TEXT_TOKENS)
    except PgfastError as error:
        raise ExportError(f"the checkpoint's tokenizer cannot be used: {error}") from error
