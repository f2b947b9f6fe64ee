"""`load()` and `Engine`: the only place where pictures, text and tokens meet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgfast.bundle import Bundle
from pgfast.errors import InputError, PromptError, ProviderError
from pgfast.image import ImageInput, open_image, to_pixel_values
from pgfast.manifest import TOKENIZER, Manifest
from pgfast.prompt import Tokenizer, cut_at_stop, fill_template, safe_length
from pgfast.runtime import generation
from pgfast.runtime.decoder import Decoder
from pgfast.runtime.model import Model
from pgfast.runtime.providers import Target, candidates, check_available, engine_cache
from pgfast.types import Answer, EncodedImage, GenerateOptions, Timings
from pgfast.validation import check_options, check_texts

logger = logging.getLogger(__name__)

MAX_BATCH = 16
"""Rows that run through the decoder together; longer batches are cut."""


def demo_bundle() -> Path:
    """Folder of the bundle that ships with the package."""
    return Path(__file__).parent / "demo" / "bundle"


def load(bundle: str | Path | None = None, *, provider: str = "auto", threads: int | None = None, device_id: int = 0) -> Engine:
    """Load a bundle.

    Args:
        bundle: Its directory; None loads the small demo model inside the package.
        provider: auto, cpu, cuda, tensorrt or tensorrt-rtx. `auto` takes the best one that works.
        threads: CPU threads; None: one per core.
        device_id: Which GPU.

    Raises:
        BundleError: The bundle is damaged or incomplete.
        ProviderError: The provider asked for cannot run here; the message names the missing piece.
    """
    opened = Bundle.open(Path(bundle) if bundle is not None else demo_bundle())
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= 1024):
        raise InputError(f"threads is {threads!r}: a whole number from 1 to 1024 is needed")
    manifest = opened.manifest
    failures: list[str] = []
    for name in candidates(provider, manifest.dialect):
        cache = engine_cache(name, opened.folder, manifest.digest())
        target = Target(name, device_id, fp16=manifest.cache_type == "float16", cache_dir=cache)
        try:
            check_available(name)
            engine = Engine(opened, target, threads)
        except ProviderError as error:
            if provider != "auto":
                raise
            failures.append(str(error))
            continue
        logger.info("running on %s", name)
        if name == "tensorrt-rtx" and (stale := manifest.engines_of_other_graphs()):
            files = ", ".join(engine.file for engine in stale)
            # answers are right all the same: onnxruntime compiles the graph itself
            logger.warning("%s: built from another graph than the bundle's; 'pgfast engines' rebuilds", files)
        return engine
    raise ProviderError("no provider works: " + "; ".join(failures))


@dataclass(frozen=True, slots=True)
class _Request:
    """One row of a batch, ready for the decoder."""

    image: EncodedImage
    prompt: list[int]


class Engine:
    """A loaded bundle; make one with `pgfast.load`. Calls from several threads run one after the other."""

    def __init__(self, bundle: Bundle, target: Target, threads: int | None) -> None:
        manifest = bundle.manifest
        self._bundle, self._target = bundle, target
        self._tokenizer = Tokenizer(bundle.path(TOKENIZER), bos_id=manifest.tokens.bos)
        self._tokenizer.check_ids(manifest.dimensions.vocab_size)
        self._model = Model(bundle, target, threads)
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def provider(self) -> str:
        """Where the graphs run: cpu, cuda, tensorrt or tensorrt-rtx."""
        return self._target.name

    def answer(
        self,
        image: ImageInput | EncodedImage,
        question: str,
        *,
        choices: Sequence[str] | None = None,
        language: str = "en",
        options: GenerateOptions | None = None,
    ) -> Answer:
        """Answer a question about a picture.

        Args:
            image: Path, bytes, `PIL.Image.Image`, uint8 array [H, W, 3], or an `EncodedImage`.
            question: Plain text; the bundle's template is put around it.
            choices: Score exactly these answers and return the most probable one.
            language: Code that the template names, for example `en`.
            options: How to decode.

        Raises:
            InputError: The picture, the question or an option cannot be used.
        """
        return self._run([(image, self._answer_prompt(question, language))], options, choices)[0]

    def answer_batch(
        self,
        questions: list[tuple[ImageInput | EncodedImage, str]],
        *,
        language: str = "en",
        options: GenerateOptions | None = None,
    ) -> list[Answer]:
        """Answer many questions, token for token as one by one; a picture object that comes again is encoded once.

        Args:
            questions: Pairs of picture and question.
            language: As in `answer`.
            options: How to decode.

        Raises:
            InputError: A picture or a question cannot be used; nothing is answered then.
        """
        if not isinstance(questions, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in questions):
            raise InputError("questions is a list of (picture, question) pairs")
        pairs = [(image, self._answer_prompt(question, language)) for image, question in questions]
        return self._run(pairs, options, None)

    def generate(self, image: ImageInput | EncodedImage, prompt: str, *, options: GenerateOptions | None = None) -> Answer:
        """Continue a raw prompt, for example `caption en`; no template is put around it (arguments as in `answer`)."""
        return self._run([(image, prompt)], options, None)[0]

    def stream(self, image: ImageInput | EncodedImage, prompt: str, *, options: GenerateOptions | None = None) -> Iterator[str]:
        """Continue a raw prompt, yielding pieces of text that add up to the whole (arguments as in `answer`).

        The prompt is checked at once; the model runs while the pieces are taken. Other calls may come in between.
        """
        options = check_options(options, self.manifest.limits.new_tokens)
        request = _Request(self.encode_image(image), self._encode_prompt(prompt))
        return self._stream(request, options)

    def encode_image(self, image: ImageInput | EncodedImage) -> EncodedImage:
        """Run the vision encoder once, to ask several questions about the picture (`image` as in `answer`)."""
        return image if isinstance(image, EncodedImage) and self._own(image) else self._encode(image)[0]

    def _run(
        self,
        pairs: Sequence[tuple[ImageInput | EncodedImage, str]],
        options: GenerateOptions | None,
        choices: Sequence[str] | None,
    ) -> list[Answer]:
        start = time.perf_counter()
        options = check_options(options, self.manifest.limits.new_tokens)
        # texts first: they are cheap to refuse
        prompts = [self._encode_prompt(prompt) for _, prompt in pairs]
        choice_ids = self._encode_choices(choices)
        preprocess, vision = time.perf_counter() - start, 0.0
        encoded: dict[int, EncodedImage] = {}
        for image, _ in pairs:
            if id(image) in encoded:
                continue
            if isinstance(image, EncodedImage) and self._own(image):
                encoded[id(image)] = image
            else:
                encoded[id(image)], seconds = self._encode(image)
                vision += seconds[1]
                preprocess += seconds[0]
        requests = [_Request(encoded[id(image)], prompt) for (image, _), prompt in zip(pairs, prompts, strict=True)]
        answers: list[Answer] = []
        for first in range(0, len(requests), MAX_BATCH):
            part = requests[first : first + MAX_BATCH]
            with self._lock:
                if choice_ids is not None and choices is not None:
                    answers += self._choose(part[0], choices, choice_ids, (start, preprocess, vision))
                else:
                    answers += self._generate(part, options, (start, preprocess, vision))
        return answers

    def _generate(self, requests: list[_Request], options: GenerateOptions, spent: tuple[float, float, float]) -> list[Answer]:
        start, preprocess, vision = spent
        clock = generation.Clock()
        *_, rows = self._loop(self._model.decoder, requests, options, clock)  # the rows after the last token
        timings = Timings(
            preprocess=preprocess,
            vision=vision,
            prefill=clock.first_token - clock.start,
            decode=clock.end - clock.first_token,
            ttft=clock.first_token - start,
            total=time.perf_counter() - start,
        )
        return [self._to_answer(row, options, timings) for row in rows]

    def _loop(
        self, decoder: Decoder, requests: list[_Request], options: GenerateOptions, clock: generation.Clock
    ) -> Generator[list[generation.Row]]:
        features = np.concatenate([request.image.image_features for request in requests])  # [B, P, D]
        return generation.generate(
            decoder,
            features,
            [request.prompt for request in requests],
            options,
            max_new_tokens=options.max_new_tokens or self.manifest.limits.new_tokens,
            eos_id=self.manifest.tokens.eos,
            stopped=lambda ids: any(stop in self._tokenizer.decode(ids) for stop in options.stop),
            clock=clock,
        )

    def _stream(self, request: _Request, options: GenerateOptions) -> Iterator[str]:
        given = ""
        # a cache of its own: while the caller thinks about a piece, other questions may be answered
        for rows in self._loop(self._model.new_decoder(), [request], options, generation.Clock()):
            text = cut_at_stop(self._tokenizer.decode(rows[0].token_ids), options.stop)
            done = rows[0].finish_reason is not None
            safe = text if done else text[: safe_length(text, options.stop)]
            if safe.startswith(given) and len(safe) > len(given):
                yield safe[len(given) :]
                given = safe

    def _choose(
        self, request: _Request, choices: Sequence[str], choice_ids: list[list[int]], spent: tuple[float, float, float]
    ) -> list[Answer]:
        start, preprocess, vision = spent
        begun = time.perf_counter()
        scores: list[list[float]] = []
        for first in range(0, len(choice_ids), MAX_BATCH):
            part = choice_ids[first : first + MAX_BATCH]
            scores += generation.score_choices(self._model.decoder, request.image.image_features, request.prompt, part)
        totals = np.array([sum(score) for score in scores])
        shares = np.exp(totals - totals.max())
        best, end = int(totals.argmax()), time.perf_counter()
        answer = Answer(
            text=choices[best],
            confidence=float(np.exp(totals[best])),
            token_ids=tuple(choice_ids[best]),
            token_logprobs=tuple(scores[best]),
            finish_reason="stop",
            choices=dict(zip(choices, (shares / shares.sum()).tolist(), strict=True)),
            timings=Timings(preprocess, vision, end - begun, 0.0, end - start, end - start),
        )
        return [answer]

    def _to_answer(self, row: generation.Row, options: GenerateOptions, timings: Timings) -> Answer:
        return Answer(
            text=cut_at_stop(self._tokenizer.decode(row.token_ids), options.stop).strip(),
            confidence=float(np.exp(sum(row.token_logprobs))),
            token_ids=tuple(row.token_ids),
            token_logprobs=tuple(row.token_logprobs),
            finish_reason="stop" if row.finish_reason == "stop" else "length",
            choices=None,
            timings=timings,
        )

    def _encode(self, image: ImageInput) -> tuple[EncodedImage, tuple[float, float]]:
        """Encode a picture; also returns the seconds of preprocessing and of the vision encoder."""
        start = time.perf_counter()
        picture = open_image(image)
        pixels = to_pixel_values(picture, self.manifest.image)
        prepared = time.perf_counter()
        features = np.asarray(self._model.encode(pixels))
        seconds = (prepared - start, time.perf_counter() - prepared)
        return EncodedImage(features, picture.width, picture.height, self._bundle_id), seconds

    @property
    def _bundle_id(self) -> str:
        """Tells encoded images of this vision encoder from those of another."""
        m = self.manifest
        names = (m.graphs["vision_encoder"].file, f"{m.graphs['vision_encoder'].file}.data")
        return "-".join([*(m.files[name].sha256 for name in names if name in m.files), str(m.image)])

    def _own(self, image: EncodedImage) -> bool:
        if image.bundle_id != self._bundle_id:
            raise InputError("this EncodedImage was made with another bundle: encode the picture again")
        d = self.manifest.dimensions
        if getattr(image.image_features, "shape", None) != (1, d.num_image_tokens, d.hidden_size):
            raise InputError(f"image_features must be [1, {d.num_image_tokens}, {d.hidden_size}]: encode the picture again")
        return True

    def _answer_prompt(self, question: str, language: str) -> str:
        if not isinstance(question, str) or not question.strip():
            raise PromptError("the question is empty: ask something about the picture")
        if not isinstance(language, str):
            raise PromptError(f"language is a code such as 'en', not {language!r}")
        return fill_template(self.manifest.prompts["answer"], text=question.strip(), language=language)

    def _encode_prompt(self, prompt: str) -> list[int]:
        return self._tokenizer.encode_prompt(prompt, max_tokens=self.manifest.limits.prompt_tokens)

    def _encode_choices(self, choices: Sequence[str] | None) -> list[list[int]] | None:
        if choices is None:
            return None
        if not check_texts("choices", choices):
            raise InputError("choices is empty: give at least one answer")
        most, seen = self.manifest.limits.new_tokens, dict[tuple[int, ...], str]()
        for choice in choices:
            ids = (*self._tokenizer.encode_suffix(choice, max_tokens=most), self.manifest.tokens.eos)
            if len(ids) > most:
                raise InputError(f"the choice {choice[:40]!r} has {len(ids)} tokens: this bundle makes at most {most}")
            if ids in seen:
                raise InputError(f"the model cannot tell the choices {seen[ids]!r} and {choice!r} apart")
            seen[ids] = choice
        return [list(ids) for ids in seen]
