"""`--verify`: the bundle against transformers, on pictures and questions made here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgfast.bundle import Bundle
from pgfast.errors import ExportError, MissingDependencyError
from pgfast.image import to_pixel_values
from pgfast.manifest import TOKENIZER
from pgfast.prompt import Tokenizer, fill_template
from pgfast.runtime.model import Model
from pgfast.runtime.providers import Target

THRESHOLDS = {"fp32": 1e-4, "fp16": 1e-2}
"""Largest relative error of the logits at any position, |ours - reference| / |reference|."""
QUESTIONS = ("what is in the picture?", "what color is it?", "is there a person in the picture?", "how many are there?")
NEW_TOKENS = 8


class TransformersReference:
    """transformers' own forward pass in fp32 with eager attention; nothing is left to its defaults.

    Without `token_type_ids` transformers 5.12 and later prefill causally, so types and positions are always given.

    Args:
        folder: The checkpoint.
        adapter: Folder of a LoRA adapter, which PEFT merges.
    """

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise MissingDependencyError(error.name or "torch", "verify") from error
        self._torch, self.name = torch, f"transformers {transformers.__version__}, fp32, eager"
        model_class: Any = transformers.PaliGemmaForConditionalGeneration
        self._model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if adapter is not None:
            self._merge(adapter)

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
        """Recompute everything and return the last position's logits, [V].

        Args:
            pixel_values: [1, 3, R, R].
            prompt: `<bos>` to newline; the image tokens are put in front.
            generated: Tokens after the prompt.
        """
        torch, base = self._torch, self._model.model
        with torch.inference_mode():
            features = base.get_image_features(torch.from_numpy(pixel_values)).pooler_output  # [1, P, D]
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
            )
        result: NDArray[Any] = out.logits[0, -1].float().numpy()
        return result


def relative_error(ours: NDArray[Any], reference: NDArray[Any]) -> float:
    """|ours - reference| / |reference| in the Euclidean norm."""
    difference = ours.astype(np.float64) - reference.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def verify(checkpoint: Path, bundle: Bundle, adapter: Path | None = None) -> dict[str, Any]:
    """Compare a bundle with its checkpoint.

    Args:
        checkpoint: The Hugging Face folder it was exported from.
        bundle: The bundle; it runs on the CPU, whatever its target.
        adapter: Folder of the adapter that was merged.

    Returns:
        The parity report for the manifest.

    Raises:
        ExportError: The error is above the precision's threshold, or an fp32 bundle gives another token.
    """
    m = bundle.manifest
    reference = TransformersReference(checkpoint, adapter)
    model = Model(bundle, Target("cpu"))
    decoder = model.decoder
    tokenizer = Tokenizer(bundle.path(TOKENIZER), bos_id=m.tokens.bos)
    errors, same, count = [], 0, 0
    for picture, question in zip(_pictures(len(QUESTIONS)), QUESTIONS, strict=True):
        pixels = to_pixel_values(picture, m.image)
        prompt_text = fill_template(m.prompts["answer"], text=question, language="en")
        prompt = tokenizer.encode_prompt(prompt_text, max_tokens=m.limits.prompt_tokens)
        decoder.prompt(model.encode(pixels), [prompt])
        generated: list[int] = []
        for _ in range(min(NEW_TOKENS, m.limits.new_tokens)):
            wanted = reference.logits(pixels, prompt, generated)
            errors.append(relative_error(decoder.logits[0], wanted))
            same += int(decoder.logits[0].argmax()) == int(wanted.argmax())
            count += 1
            # both continue with the reference's token, so one flipped near-tie is counted once
            generated.append(int(wanted.argmax()))
            decoder.step(np.array(generated[-1:]))
    if not np.isfinite(errors).all():
        raise ExportError(f"the bundle's logits are not finite at {int((~np.isfinite(errors)).sum())} of {count} positions")
    report = {
        "reference": reference.name,
        "positions": count,
        "max_relative_logit_error": float(f"{max(errors):.3g}"),
        "mean_relative_logit_error": float(f"{np.mean(errors):.3g}"),
        "greedy_agreement": round(same / count, 4),
        "threshold": THRESHOLDS[m.precision],
    }
    if max(errors) > THRESHOLDS[m.precision] or (m.precision == "fp32" and same < count):
        raise ExportError(f"the bundle differs from its checkpoint: {report}")
    return report


def _pictures(count: int) -> list[Any]:
    """Smooth random colour fields, the same every time."""
    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    return [Image.fromarray(field).resize((301, 217), Image.Resampling.BICUBIC) for field in small]
