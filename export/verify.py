"""`--verify`: the bundle against transformers, on pictures and questions made here."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.errors import ExportError, MissingDependencyError
from pgfast.image import open_image, to_pixel_values
from pgfast.manifest import TOKENIZER, Manifest
from pgfast.prompt import Tokenizer, fill_template
from pgfast.runtime.model import Model
from pgfast.runtime.providers import Target
from pgfast.runtime.sampling import log_softmax

THRESHOLDS = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.1, "int4": 0.5}
"""Largest relative error of the logits at any position, |ours - reference| / |reference|."""
QUESTIONS = ("what is in the picture?", "what color is it?", "is there a person in the picture?", "how many are there?")
NEW_TOKENS = 8


class TransformersReference:
    """transformers' own forward pass in fp32 with eager attention; nothing is left to its defaults.

    Without `token_type_ids` transformers 5.12 and later prefill causally, so types and positions are always given.

    Args:
        folder: The checkpoint.
        adapter: Folder of a LoRA adapter, which PEFT merges.
        device: torch's name of the device.
    """

    def __init__(self, folder: Path, adapter: Path | None = None, device: str = "cpu") -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise MissingDependencyError(error.name or "torch", "verify") from error
        transformers.utils.logging.disable_progress_bar()
        self._torch, self.name = torch, f"transformers {transformers.__version__}, fp32, eager"
        model_class: Any = transformers.PaliGemmaForConditionalGeneration
        self._model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.largest_activation = 0.0
        if adapter is not None:
            self._merge(adapter)
        self._device = torch.device(device)
        self._model.to(self._device)

    def _merge(self, adapter: Path) -> None:
        """Let PEFT merge an adapter into the model."""
        try:
            import peft
        except ImportError as error:
            raise MissingDependencyError(error.name or "peft", "verify") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # names of transformers that PEFT still uses
            try:
                self._model = peft.PeftModel.from_pretrained(self._model, adapter).merge_and_unload().eval()
            except (ValueError, RuntimeError) as error:
                raise ExportError(f"PEFT cannot merge the adapter: {' '.join(str(error).split())[:300]}") from error
        self.name += f", adapter merged by peft {peft.__version__}"

    def logits(self, pixel_values: NDArray[np.float32], prompt: Sequence[int], generated: Sequence[int] = ()) -> NDArray[Any]:
        """Recompute everything and return the last position's logits, [V]; also notes the largest hidden value seen.

        Args:
            pixel_values: [1, 3, R, R].
            prompt: `<bos>` to newline; the image tokens are put in front.
            generated: Tokens after the prompt.
        """
        torch, base = self._torch, self._model.model
        with torch.inference_mode(), self._device:
            features = base.get_image_features(torch.from_numpy(pixel_values).to(self._device)).pooler_output  # [1, P, D]
            # embeddings rather than ids: a generated token may have the id that stands for image positions
            text = base.get_input_embeddings()(torch.tensor([[*prompt, *generated]]))
            embeds = torch.cat([features, text], dim=1)
            types = torch.zeros(embeds.shape[:2], dtype=torch.long)
            types[:, features.shape[1] + len(prompt) :] = 1
            out = self._model(
                inputs_embeds=embeds,
                token_type_ids=types,
                attention_mask=torch.ones_like(types),
                position_ids=torch.arange(1, embeds.shape[1] + 1)[None],
                use_cache=False,
                logits_to_keep=1,
                output_hidden_states=True,
            )
            largest = max(float(hidden.abs().max()) for hidden in out.hidden_states)
        self.largest_activation = max(self.largest_activation, largest)
        result: NDArray[Any] = out.logits[0, -1].float().cpu().numpy()
        return result


def relative_error(ours: NDArray[Any], reference: NDArray[Any]) -> float:
    """|ours - reference| / |reference| in the Euclidean norm."""
    difference = ours.astype(np.float64) - reference.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def check_possible(precisions: Sequence[str], adapter: Path | None) -> None:
    """Refuse before any work what `verify` would refuse after it.

    Raises:
        MissingDependencyError: A library of the reference is not installed.
        ExportError: There are no CPU kernels for the precision.
    """
    for module in ("torch", "transformers", *(("peft",) if adapter else ())):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, "verify")
    if "bf16" in precisions:
        raise ExportError("a bf16 bundle cannot be verified here: ONNX Runtime's CPU provider has no bfloat16 kernels")


Sample = tuple[Any, str]
"""A picture as `pgfast.image.open_image` takes it, and a question."""


def read_samples(path: Path) -> list[Sample]:
    """Read JSON lines of `{"image": path, "question": text}`; relative paths start at the file's folder.

    Raises:
        ExportError: A line is not of that form; the message has its number.
    """
    samples: list[Sample] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, question = path.parent / row["image"], str(row["question"])
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f'{path} line {number}: {{"image": ..., "question": ...}} is needed ({error!r})') from error
        if not image.is_file():
            raise ExportError(f"{path} line {number}: {image} does not exist")
        samples.append((image, question))
    if not samples:
        raise ExportError(f"{path} has no samples")
    return samples


def built_in_samples() -> list[Sample]:
    """Questions about smooth random colour fields, the same every time."""
    return list(zip(_pictures(len(QUESTIONS)), QUESTIONS, strict=True))


def verify(
    checkpoint: Path, bundle: Bundle, samples: Sequence[Sample] | None = None, adapter: Path | None = None
) -> dict[str, Any]:
    """Compare a bundle with its checkpoint.

    Args:
        checkpoint: The Hugging Face folder it was exported from.
        bundle: The bundle; it runs on the CPU, whatever its target.
        samples: Pictures and questions; None: built-in ones.
        adapter: Folder of the adapter that was merged.

    Returns:
        The parity report for the manifest.

    Raises:
        ExportError: The error is above the precision's threshold, or an fp32 bundle gives another token.
    """
    m = bundle.manifest
    reference = TransformersReference(checkpoint, adapter)
    model = Model(bundle, Target("cpu"))
    tokenizer = Tokenizer(bundle.path(TOKENIZER), bos_id=m.tokens.bos)
    positions = [
        position
        for image, question in (samples or built_in_samples())
        for position in _compare(model, m, tokenizer, reference, image, question)
    ]
    errors = np.array([position.error for position in positions])
    if not np.isfinite(errors).all():
        raise ExportError(
            f"the bundle's logits are not finite at {int((~np.isfinite(errors)).sum())} of {len(errors)} positions"
        )
    threshold = max(THRESHOLDS[m.precision], THRESHOLDS[m.vision_precision])
    worst = positions[int(errors.argmax())]
    agreement = float(np.mean([position.same for position in positions]))
    report = {
        "reference": reference.name,
        "positions": len(positions),
        "max_relative_logit_error": _round(errors.max()),
        "mean_relative_logit_error": _round(errors.mean()),
        "worst": worst.where,
        "greedy_agreement": round(agreement, 4),
        # of the reference's own answers: what quantization costs in likelihood
        "perplexity": _round(np.exp(-np.mean([position.logprob for position in positions]))),
        "reference_perplexity": _round(np.exp(-np.mean([position.reference_logprob for position in positions]))),
        "largest_activation": _round(reference.largest_activation),
        "threshold": threshold,
    }
    if errors.max() > threshold or (m.precision == m.vision_precision == "fp32" and agreement < 1):
        raise ExportError(f"the bundle differs from its checkpoint: {report}")
    return report


@dataclass(frozen=True, slots=True)
class _Position:
    """One compared position."""

    error: float
    same: bool
    """Both choose the same token."""
    logprob: float
    """Of the reference's token, by the bundle."""
    reference_logprob: float
    where: str


def _compare(
    model: Model, m: Manifest, tokenizer: Tokenizer, reference: TransformersReference, image: Any, question: str
) -> Iterator[_Position]:
    """Answer one question with both, feeding both the reference's tokens, so that a flipped near-tie counts once."""
    decoder, pixels = model.decoder, to_pixel_values(open_image(image), m.image)
    text = fill_template(m.prompts["answer"], text=question, language="en")
    prompt = tokenizer.encode_prompt(text, max_tokens=m.limits.prompt_tokens)
    decoder.prompt(model.encode(pixels), [prompt])
    generated: list[int] = []
    for number in range(min(NEW_TOKENS, m.limits.new_tokens)):
        wanted, ours = reference.logits(pixels, prompt, generated), decoder.logits(0)
        token = int(wanted.argmax())
        yield _Position(
            error=relative_error(ours, wanted),
            same=int(ours.argmax()) == token,
            logprob=float(log_softmax(ours)[token]),
            reference_logprob=float(log_softmax(wanted)[token]),
            where=f"token {number + 1} of {question!r}",
        )
        generated.append(token)
        if token == m.tokens.eos:
            return
        decoder.step(1, np.array([token]))


def _round(value: float) -> float:
    return float(f"{float(value):.3g}")


def _pictures(count: int) -> list[Any]:
    """Smooth random colour fields, the same every time."""
    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    return [Image.fromarray(field).resize((301, 217), Image.Resampling.BICUBIC) for field in small]
