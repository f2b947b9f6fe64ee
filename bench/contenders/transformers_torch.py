"""transformers: what most users run. `generate()`, greedy, with the library's default attention."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Inputs, Outcome, Probe, Request, Spec, log_probability, one_by_one


class Transformers:
    """`PaliGemmaForConditionalGeneration` in eager mode, or compiled with a static cache (`precision` ends in "-compiled").

    `token_type_ids` are given: without them transformers 5.12 and later prefill causally, which is another function.
    """

    def __init__(self, spec: Spec) -> None:
        import torch
        import transformers

        torch.set_num_threads(spec.threads)
        transformers.utils.logging.disable_progress_bar()
        precision, *compiled = spec.precision.split("-")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._device = "cuda" if spec.provider != "cpu" else "cpu"
        self._torch, self._dtype, self._inputs = torch, dtype, Inputs(spec.bundle)
        model_class: Any = transformers.PaliGemmaForConditionalGeneration
        self._model = model_class.from_pretrained(spec.path, dtype=dtype).to(self._device).eval()
        self._cache = {"cache_implementation": "static"} if compiled else {}  # generate() compiles its step with that
        tokens = self._inputs.manifest.tokens
        self._image_token = self._model.config.image_token_id
        self._ends = {"eos_token_id": tokens.eos, "pad_token_id": tokens.pad}

    def answer(self, request: Request) -> Outcome:
        """Answer a request."""
        if request.reuse_picture:
            return one_by_one(self, request)
        clock = _FirstToken()
        start = time.perf_counter()
        feeds = self._feeds(request)
        ids = self._generate(feeds, request.new_tokens, streamer=clock)
        tokens = self._rows(ids, feeds)
        self._inputs.text(tokens)
        return Outcome(tokens, clock.first - start, time.perf_counter() - start)

    def probe(self, picture: NDArray[np.uint8], prompt: str, new_tokens: int) -> Probe:
        """Return greedy tokens and the first one's log-probability."""
        feeds = self._feeds(Request([picture], [prompt], new_tokens))
        result = self._generate(feeds, new_tokens, return_dict_in_generate=True, output_logits=True)
        (tokens,) = self._rows(result.sequences, feeds)
        return Probe(tokens, log_probability(result.logits[0][0].float().cpu().numpy(), tokens[0]))

    def device_bytes(self) -> int | None:
        """Peak of torch's allocator on the GPU."""
        return int(self._torch.cuda.max_memory_allocated()) if self._device == "cuda" else None

    def _feeds(self, request: Request) -> dict[str, Any]:
        torch, images = self._torch, self._inputs.manifest.dimensions.num_image_tokens
        ids = self._inputs.ids(request.prompts)
        ids = np.concatenate([np.full((len(ids), images), self._image_token), ids], axis=1)  # [B, P + S]
        feeds = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.ones(ids.shape, dtype=torch.int64),
            "token_type_ids": torch.zeros(ids.shape, dtype=torch.int64),
            "pixel_values": torch.from_numpy(self._inputs.pixels(request.pictures)).to(self._dtype),
        }
        return {name: value.to(self._device) for name, value in feeds.items()}

    def _generate(self, feeds: dict[str, Any], new_tokens: int, **options: Any) -> Any:
        with self._torch.inference_mode():
            return self._model.generate(
                **feeds, max_new_tokens=new_tokens, do_sample=False, **self._ends, **self._cache, **options
            )

    def _rows(self, ids: Any, feeds: dict[str, Any]) -> list[list[int]]:
        """Cut off the prompt, and in a batch the padding behind `<eos>`."""
        rows = []
        for row in ids[:, feeds["input_ids"].shape[1] :].tolist():
            eos = self._ends["eos_token_id"]
            rows.append(row[: row.index(eos) + 1] if eos in row else row)
        return rows


class _FirstToken:
    """A streamer that notes when the first token came; the prompt is streamed before it."""

    def __init__(self) -> None:
        self._calls, self.first = 0, 0.0

    def put(self, value: Any) -> None:
        self._calls += 1
        if self._calls == 2:  # the copy to the host, which generate() made, has waited for the GPU
            self.first = time.perf_counter()

    def end(self) -> None:
        pass
