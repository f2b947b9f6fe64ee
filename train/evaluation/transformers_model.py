"""A checkpoint in transformers, answering questions with its own greedy `generate`; ids and pixels are pgfast's own.

Shapes: B questions, P image tokens, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgfast.errors import InputError, MissingDependencyError, PromptError, TrainError
from pgfast.image import ImageInput, open_image, to_pixel_values
from pgfast.manifest import ImageSpec
from pgfast.prompt import Tokenizer, fill_template

from .predictions import Asked, Prediction

if TYPE_CHECKING:
    import torch

TEXT_TOKENS = 128
"""Most prompt tokens, and most new tokens, as a bundle has them."""
BATCH = 32
"""Questions of one `generate`."""
RECENT = 64
"""Pictures kept as pixels, for the questions of equal length that come later in a chunk."""


@dataclass(frozen=True, slots=True)
class TransformersModel:
    """A PaliGemma of transformers with what its prompts and pictures need."""

    model: Any
    """`PaliGemmaForConditionalGeneration`, in eval mode, without the cap of its logits (see `softcap`)."""
    tokenizer: Tokenizer
    image: ImageSpec
    num_image_tokens: int
    image_token_id: int
    eos_id: int
    pad_id: int
    softcap: float | None
    """PaliGemma 2's cap of the logits, for probabilities; transformers below 5.23 leaves it out, so it is done here. The most
    probable token is the same with and without."""
    template: str
    max_tokens: int
    """Most prompt tokens, and most new tokens."""
    described: dict[str, Any]
    """What a report says about it."""

    def answer(
        self, chunk: Sequence[Asked], image_of: Callable[[int], ImageInput], *, language: str = "en"
    ) -> list[Prediction]:
        """Answer questions, in batches of equal prompt length, so that nothing is padded.

        Args:
            chunk: Rows and questions.
            image_of: The picture of a row.
            language: What the template's `{language}` becomes.

        Raises:
            InputError: A picture or a text cannot be used; nothing is answered then.
        """
        by_length = defaultdict[int, list[int]](list)
        prompts = [self._encode(text=record.text, is_prompt=record.is_prompt, language=language) for _, record in chunk]
        for at, prompt in enumerate(prompts):
            by_length[len(prompt)].append(at)
        row_of = {record.picture: row for row, record in reversed(chunk)}
        pixels = lru_cache(RECENT)(lambda picture: to_pixel_values(open_image(image_of(row_of[picture])), self.image))
        found: dict[int, Prediction] = {}
        for places in by_length.values():
            for start in range(0, len(places), BATCH):
                part = places[start : start + BATCH]
                pictures = [pixels(chunk[at][1].picture) for at in part]
                found.update(zip(part, self._generate([prompts[at] for at in part], pictures), strict=True))
        return [found[at] for at in range(len(chunk))]

    def _encode(self, *, text: str, is_prompt: bool, language: str) -> list[int]:
        if not is_prompt:
            if not text.strip():
                raise PromptError("the question is empty: ask something about the picture")
            text = fill_template(self.template, text=text.strip(), language=language)
        return self.tokenizer.encode_prompt(text, max_tokens=self.max_tokens)

    def _generate(self, prompts: list[list[int]], pictures: list[Any]) -> list[Prediction]:
        import numpy as np
        import torch
        from transformers import GenerationConfig

        logprobs: list[torch.Tensor] = []  # of the greedy token, [B] per step

        def note(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            capped = logits.float()
            if self.softcap is not None:
                capped = torch.tanh(capped / self.softcap) * self.softcap
            logprobs.append(capped.log_softmax(-1).amax(-1))
            return logits

        device = self.model.device
        ids = torch.tensor([[self.image_token_id] * self.num_image_tokens + prompt for prompt in prompts], device=device)
        # a configuration of our own, so that nothing of the checkpoint's generation_config.json takes part
        greedy = GenerationConfig(
            max_new_tokens=self.max_tokens, do_sample=False, eos_token_id=self.eos_id, pad_token_id=self.pad_id
        )
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                pixel_values=torch.from_numpy(np.concatenate(pictures)).to(device, self.model.dtype),  # [B, 3, R, R]
                attention_mask=torch.ones_like(ids),
                # without these transformers 5.12 and later prefill causally
                token_type_ids=torch.zeros_like(ids),
                generation_config=greedy,
                logits_processor=[note],
            )
        generated = out[:, ids.shape[1] :].tolist()
        chances = torch.stack(logprobs, dim=1).tolist()
        return [self._prediction(row, chance) for row, chance in zip(generated, chances, strict=True)]

    def _prediction(self, ids: list[int], logprobs: list[float]) -> Prediction:
        length = ids.index(self.eos_id) + 1 if self.eos_id in ids else len(ids)
        return Prediction(self.tokenizer.decode(ids[:length]).strip(), math.exp(sum(logprobs[:length])))


def load_checkpoint(
    checkpoint: str,
    *,
    adapter: Path | None = None,
    answer_template: str | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> TransformersModel:
    """Load a checkpoint into transformers: in fp32 on a CPU, in its own type on a GPU.

    Args:
        checkpoint: A Hugging Face folder or Hub id.
        adapter: Folder of a PEFT adapter, which is merged.
        answer_template: Prompt of a question; the folder's `pgfast_prompts.json` goes first.
        device: auto, cpu or cuda.
        threads: CPU threads; None: torch's own choice.

    Raises:
        ExportError: Not a PaliGemma checkpoint.
        InputError: The template or the device cannot be used.
        TrainError: transformers or PEFT cannot load it.
        MissingDependencyError: A library of the extra `train` is not installed.
    """
    from pgfast.export.checkpoint import locate, read_answer_template, read_image_spec
    from pgfast.export.config import read_config

    # everything small first: weights take minutes
    source = locate(checkpoint)
    config = read_config(source.path / "config.json")
    template = read_answer_template([*([adapter] if adapter else []), source.path], answer_template)
    image = read_image_spec(source.path, config.vision.image_size)
    tokenizer = Tokenizer(source.path / "tokenizer.json", bos_id=config.bos_token_id)
    tokenizer.check_ids(config.text.vocab_size)
    model, versions = _load(source.path, adapter, device, threads)
    if config.text.final_logit_softcapping is not None:
        model.config.get_text_config().final_logit_softcapping = None
    p = config.vision.num_image_tokens
    described = {
        "checkpoint": source.name,
        "revision": source.revision,
        "adapter": adapter.resolve().name if adapter is not None else None,
        "template": template,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return TransformersModel(
        model=model,
        tokenizer=tokenizer,
        image=image,
        num_image_tokens=p,
        image_token_id=config.image_token_id,
        eos_id=config.eos_token_id,
        pad_id=config.pad_token_id,
        softcap=config.text.final_logit_softcapping,
        template=template,
        max_tokens=min(TEXT_TOKENS, (config.text.max_position_embeddings - p) // 2),
        described=described | versions,
    )


def _load(folder: Path, adapter: Path | None, device: str, threads: int | None) -> tuple[Any, dict[str, str]]:
    """The model, in eval mode on its device, and the versions of the libraries."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "train") from error
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"a checkpoint runs in torch, which has no {device!r} here: take auto or cpu, or export a bundle")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    model_class: Any = transformers.PaliGemmaForConditionalGeneration
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} has no adapter_config.json: give the folder that PEFT saved")
    try:
        model = model_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    except Exception as error:  # whatever transformers, torch and safetensors raise for a damaged file
        raise TrainError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
    if adapter is not None:
        model, versions["peft"] = _merge(model, adapter)
    return model.eval().to(device), versions


def _merge(model: Any, adapter: Path) -> tuple[Any, str]:
    """The model with the adapter merged into it, and PEFT's version."""
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(error.name or "peft", "train") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names of transformers that PEFT still uses
        try:
            return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(), peft.__version__
        except Exception as error:  # whatever PEFT, torch and safetensors raise for a damaged or foreign adapter
            raise TrainError(f"PEFT cannot merge {adapter}: {' '.join(str(error).split())[:300]}") from error
