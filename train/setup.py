"""From a base checkpoint to what is trained: precision, frozen towers, adapters, and the count of what moves."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pgfast.export.checkpoint import locate, read_image_spec, read_json
from torch import nn

from pgfast.errors import MissingDependencyError, TrainError
from pgfast.manifest import ImageSpec
from pgfast.prompt import Tokenizer

from .answer_model import AnswerModel
from .config import TrainConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PaliGemmaForConditionalGeneration

# `language_model.` keeps SigLIP out: it has q_proj, k_proj and v_proj too, and suffix matching adapts it by accident
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TOWER_OF = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language", "lm_head": "language"}


@dataclass(frozen=True, slots=True)
class Base:
    """A base checkpoint, looked at but not loaded."""

    path: Path
    name: str
    revision: str | None
    config: Any
    """transformers' `PaliGemmaConfig`."""
    image: ImageSpec
    tokenizer: Tokenizer

    @property
    def num_image_tokens(self) -> int:
        """P."""
        vision = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def fingerprint(self) -> str:
        """Hash of the configuration and of the weights' sizes, names and first megabytes: tells base models apart."""
        digest = hashlib.sha256()
        for file in sorted([self.path / "config.json", *self.path.glob("*.safetensors")]):
            with file.open("rb") as opened:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode() + opened.read(4 << 20))
        return digest.hexdigest()[:16]


def open_base(checkpoint: str) -> Base:
    """Find a base checkpoint and read all but its weights.

    Raises:
        TrainError: It is not a PaliGemma checkpoint.
        ExportError: It cannot be found, or its preprocessing is not SigLIP's.
    """
    if not checkpoint:
        raise TrainError("no base model: give --model, a Hugging Face folder or Hub id")
    try:
        from transformers import PaliGemmaConfig
    except ImportError as error:
        raise MissingDependencyError("transformers", "train") from error
    found = locate(checkpoint)
    if (found.path / "pgfast.json").exists():
        raise TrainError(f"{checkpoint} is an exported bundle: give the checkpoint that it was made from")
    if (found.path / "adapter_config.json").exists():
        raise TrainError(f"{checkpoint} is a LoRA adapter: merge it into its base first, or train from the base")
    raw = read_json(found.path / "config.json")
    if not isinstance(raw, dict):
        raise TrainError(f"no config.json in {checkpoint}: a Hugging Face checkpoint folder is needed")
    if raw.get("model_type") != "paligemma":
        raise TrainError(f"{checkpoint} is a {raw.get('model_type')!r} model: only PaliGemma is trained here")
    if not list(found.path.glob("*.safetensors")):
        raise TrainError(f"no .safetensors in {checkpoint}: the weights are missing")
    try:
        config = PaliGemmaConfig.from_pretrained(found.path)
    except Exception as error:  # whatever transformers raises for values that make no model
        raise TrainError(f"{checkpoint}/config.json is not usable: {' '.join(str(error).split())[:150]}") from error
    _settle_ids(config, checkpoint)
    tokenizer = Tokenizer(found.path / "tokenizer.json", bos_id=config.bos_token_id)
    tokenizer.check_ids(config.text_config.vocab_size)
    _check_end(config, tokenizer, checkpoint)
    spec = read_image_spec(found.path, config.vision_config.image_size)
    return Base(found.path, found.name, found.revision, config, spec, tokenizer)


def _settle_ids(config: Any, checkpoint: str) -> None:
    """Take the ids from where they are: at the top in older files, in `text_config` in newer ones."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        value = getattr(config.text_config, name, None) if value is None else value
        if not isinstance(value, int):
            raise TrainError(f"{checkpoint}/config.json: {name} is {value!r}: a whole number is needed")
        setattr(config, name, value)


def _check_end(config: Any, tokenizer: Tokenizer, checkpoint: str) -> None:
    """Make sure that answers end with `<eos>`: with another token the model would never stop."""
    shown = tokenizer.decode_with_markers([config.eos_token_id]).strip()
    if shown != "<eos>":
        raise TrainError(
            f"{checkpoint}/config.json: eos_token_id is {config.eos_token_id}, which tokenizer.json calls {shown!r}: "
            "answers would be taught without <eos>"
        )


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return bf16 or fp32; `auto` takes bf16 where the device has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = torch.cpu.get_capabilities()
    return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "fp32"


@dataclass(slots=True)
class Trainee:
    """A model ready to be trained."""

    base: Base
    answer_model: AnswerModel
    peft: PeftModel | None
    """Holds the adapters when there are any; shares all modules with `answer_model`."""

    @property
    def model(self) -> PaliGemmaForConditionalGeneration:
        """The transformers model inside."""
        return self.answer_model.model


def build(config: TrainConfig, base: Base, *, on_meta: bool = False, sparse_embedding: bool = False) -> Trainee:
    """Load the base model, freeze towers and put adapters in.

    Args:
        config: The run, its precision resolved.
        base: From `open_base`.
        on_meta: Make the modules without memory or weights, to count and to reckon.
        sparse_embedding: One process trains alone, so the gradient of words looked up may be a sparse one.

    Raises:
        TrainError: The weights do not fit the configuration.
    """
    model = _on_meta(config, base) if on_meta else _load(config, base)
    model.config.use_cache = False
    _freeze(model, config)
    peft = _adapt(model, config) if config.method != "full" else None
    if config.gradient_checkpointing:
        # the older name is deprecated where the newer one exists
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.method == "full" and sparse_embedding:
        _spare_a_gradient(model)
    projector_frozen = config.method != "full" or "projector" in config.frozen
    return Trainee(base, AnswerModel(model, vision_frozen=config.vision_frozen, projector_frozen=projector_frozen), peft)


def _spare_a_gradient(model: PaliGemmaForConditionalGeneration) -> None:
    """Let the embedding give a sparse gradient, which is added into the head's dense one.

    A second matrix of that size (2 GB in the 3B model) is never made. Untied, it would be sparse alone, and Adam refuses that.
    """
    embedding = model.get_input_embeddings()
    if embedding.weight is model.lm_head.weight:
        embedding.sparse = True


def _on_meta(config: TrainConfig, base: Base) -> PaliGemmaForConditionalGeneration:
    from transformers import PaliGemmaForConditionalGeneration

    with torch.device("meta"):
        return PaliGemmaForConditionalGeneration._from_config(
            base.config, attn_implementation=_attention(config, base), dtype=_base_dtype(config)
        )


def _base_dtype(config: TrainConfig) -> torch.dtype:
    # whole models keep fp32 masters: most updates at 2e-5 are below bf16's spacing and would round away
    return torch.bfloat16 if config.method != "full" and config.precision == "bf16" else torch.float32


def _attention(config: TrainConfig, base: Base) -> str:
    # transformers has Gemma 2's capped scores in eager attention only
    return "eager" if base.config.text_config.model_type == "gemma2" else config.attention


def _load(config: TrainConfig, base: Base) -> PaliGemmaForConditionalGeneration:
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading weights: the command line draws its own
    extra: dict[str, Any] = {}
    if config.method == "qlora":
        extra["quantization_config"] = _four_bits(_base_dtype(config))
    try:
        model, report = PaliGemmaForConditionalGeneration.from_pretrained(
            base.path,
            dtype=_base_dtype(config),
            attn_implementation=_attention(config, base),
            output_loading_info=True,
            local_files_only=True,
            **extra,
        )
    except Exception as error:  # safetensors, torch and transformers have no common root
        raise TrainError(f"{base.name} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            some = sorted(str(name) for name in report[what])[:3]
            raise TrainError(
                f"{base.name}: {what.replace('_', ' ')} {', '.join(some)}: the weights do not belong to config.json"
            )
    return model


def _four_bits(compute_dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes", "qlora") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=True,
        # patterns for a whole name up to a dot: plain "vision_tower" would match nothing
        llm_int8_skip_modules=[r".*\.vision_tower", r".*\.multi_modal_projector", "lm_head"],
    )


def _freeze(model: nn.Module, config: TrainConfig) -> None:
    for name, parameter in model.named_parameters():
        if config.method != "full" or tower_of(name) in config.frozen:
            parameter.requires_grad_(False)


def _adapt(model: PaliGemmaForConditionalGeneration, config: TrainConfig) -> PeftModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingDependencyError("peft", "train") from error
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft asks transformers by a name that is going away
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, lora)  # adapters are fp32 also on a bf16 base (autocast_adapter_dtype)


def tower_of(name: str) -> str:
    """Say which tower a parameter belongs to: vision, projector or language."""
    for part in re.split(r"\.", name):
        if part in TOWER_OF:
            return TOWER_OF[part]
    raise ValueError(name)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (trainable, all) parameters of each tower; a tied matrix counts once, four-bit ones by their weights."""
    counts = dict.fromkeys(("vision", "projector", "language"), (0, 0))
    for name, parameter in model.named_parameters():
        number = parameter.numel() * (2 if parameter.__class__.__name__ == "Params4bit" else 1)  # two in a byte
        trainable, total = counts[tower_of(name)]
        counts[tower_of(name)] = (trainable + number * parameter.requires_grad, total + number)
    return counts
