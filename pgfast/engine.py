"""`Engine`: the only place where pictures, text and tokens meet."""

from __future__ import annotations

import dataclasses
import logging
import queue
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self

import numpy as np

from pgfast.bundle import Bundle
from pgfast.errors import InputError
from pgfast.image import MAX_PIXELS, ImageInput
from pgfast.manifest import TOKENIZER, Manifest
from pgfast.masks import MaskDecoder
from pgfast.pending import Pending
from pgfast.pictures import PictureEncoder
from pgfast.prompt import Tokenizer
from pgfast.runtime.beam_search import BeamSearch
from pgfast.runtime.generation import ChoiceScores, Ending, Generation
from pgfast.runtime.model import Model
from pgfast.runtime.providers import Target
from pgfast.runtime.scheduler import Scheduler
from pgfast.runtime.turns import STALL
from pgfast.tasks import Tasks, task_prompt
from pgfast.types import Answer, EncodedImage, GenerateOptions, LoadFigures, PreparedImage
from pgfast.validation import check_options, check_stream

logger = logging.getLogger(__name__)

ENCODED_AHEAD = 8
"""Pictures of `answer_batch` that are encoded before there is a place for their question."""


class Engine(Tasks):
    """A loaded bundle; make one with `pgfast.load`.

    Calls from any number of threads share one running batch: each joins it between two tokens of the others.
    Closing it (or `with`) ends its thread; so does dropping it.
    """

    def __init__(self, bundle: Bundle, target: Target, threads: int | None) -> None:
        manifest = bundle.manifest
        self._bundle, self._target, self._calibration = bundle, target, manifest.calibration
        with ThreadPoolExecutor(1) as pool:  # 257,000 entries take a second to parse: beside the graphs
            path, ids = bundle.path(TOKENIZER), (manifest.tokens.bos, manifest.dimensions.vocab_size)
            tokenizer = pool.submit(Tokenizer.open, path, *ids)
            self._model = Model(bundle, target, threads)
            self._tokenizer = tokenizer.result()
        self._pictures = PictureEncoder(manifest, self._model)
        self._masks = MaskDecoder(bundle)
        self._scheduler = Scheduler(self._model.decoder, together=self._model.together, turns=self._model.turns, stall=STALL)
        # also before the interpreter ends: a thread that is inside onnxruntime then would crash it
        weakref.finalize(self, self._scheduler.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's thread, after the run that it is in; questions in flight fail, later ones are refused."""
        self._scheduler.close()

    @property
    def max_waiting(self) -> int | None:
        """Refuse a question (`OverloadedError`) when so many others wait for a place in the batch; None: never."""
        return self._scheduler.max_waiting

    @max_waiting.setter
    def max_waiting(self, number: int | None) -> None:
        self._scheduler.max_waiting = number

    def load_figures(self) -> LoadFigures:
        """Return how many questions wait and run at this moment."""
        return LoadFigures(*self._scheduler.load(), self._model.decoder.slots)

    @property
    def on_step(self) -> Callable[[int], None] | None:
        """Called with the number of questions that share a run of the decoder, in the engine's thread; it must be quick."""
        return self._scheduler.on_step

    @on_step.setter
    def on_step(self, callback: Callable[[int], None] | None) -> None:
        self._scheduler.on_step = callback

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
            image: Path, bytes, `PIL.Image.Image`, uint8 array [H, W, 3], or an `EncodedImage`; a list of them asks about
                several pictures at once, whose image tokens all come first.
            question: Plain text; the bundle's template is put around it.
            choices: Score exactly these answers and return the most probable one.
            language: Code that the template names, for example `en`; one of the manifest's.
            options: How to decode.

        Raises:
            InputError: The picture, the question or an option cannot be used.
        """
        return self.submit(image, question, choices=choices, language=language, options=options).result()

    def submit(
        self,
        image: ImageInput | PreparedImage | EncodedImage,
        question: str | None = None,
        *,
        prompt: str | None = None,
        choices: Sequence[str] | None = None,
        language: str = "en",
        options: GenerateOptions | None = None,
        streaming: bool = False,
        patient: bool = False,
        on_progress: Callable[[], None] | None = None,
    ) -> Pending:
        """Ask without waiting for the answer; only the vision encoder runs before it returns.

        Args:
            image: As in `answer`.
            question: As in `answer`, with `choices` and `language`; or
            prompt: a raw prompt, as in `generate`.
            choices: See `question`.
            language: See `question`.
            options: How to decode.
            streaming: Let `Pending.pieces` and `on_progress` report every token, not only the end.
            patient: The caller waits for many answers, so other patient questions may be let in before this one goes on.
            on_progress: Called in the engine's thread when there is news; it must be quick.

        Raises:
            InputError: The picture, the text or an option cannot be used.
            OverloadedError: More questions wait than `max_waiting`.
        """
        start = time.perf_counter()
        options = check_options(options, self.manifest.limits.new_tokens)
        if streaming:
            check_stream(options)
        # texts first: they are cheap to refuse
        if question is not None and prompt is not None:
            raise InputError("give a question or a raw prompt, not both")
        ids = self._encode_prompt(self._answer_prompt(question, language) if prompt is None else prompt)
        choice_ids = self._encode_choices(choices)
        row = self._generation(options, ids) if choice_ids is None else ChoiceScores(choice_ids)
        checked = time.perf_counter() - start
        (encoded,), (preprocess, vision) = self._pictures.encode([image])
        ticket = self._scheduler.submit(
            row, encoded.image_features, ids, streaming=streaming, patient=patient, on_progress=on_progress
        )
        seconds = (checked + preprocess, vision)
        return Pending(row, ticket, self._tokenizer, options, choices, start, *seconds, self._calibration)

    def answer_batch(
        self,
        questions: list[tuple[ImageInput | EncodedImage, str]],
        *,
        language: str = "en",
        options: GenerateOptions | None = None,
    ) -> list[Answer]:
        """Answer many questions, token for token as one by one; a picture object that comes again soon is encoded once.

        Args:
            questions: Pairs of picture and question.
            language: As in `answer`.
            options: How to decode.

        Raises:
            InputError: A picture or a question cannot be used; nothing is answered then.
        """
        if not isinstance(questions, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in questions):
            raise InputError("questions is a list of (picture, question) pairs")
        options = check_options(options, self.manifest.limits.new_tokens)
        # texts first: they are cheap to refuse
        prompts = [self._encode_prompt(self._answer_prompt(question, language)) for _, question in questions]
        asked: list[Pending] = []
        answers: list[Answer] = []
        recent: dict[int, EncodedImage] = {}
        # pictures are encoded here, and only a few ahead of the decoder's thread
        room = queue.SimpleQueue[None]()  # a semaphore that Ctrl-C cannot leave locked
        most = self.max_waiting
        for _ in range(ENCODED_AHEAD if most is None else max(1, min(ENCODED_AHEAD, most))):  # only others may be too many
            room.put(None)
        try:
            for first in range(0, len(questions), self._model.together):
                part = slice(first, first + self._model.together)
                start = time.perf_counter()
                images, seconds = self._pictures.encode([image for image, _ in questions[part]], recent)
                for image, prompt in zip(images, prompts[part], strict=True):
                    room.get()
                    row, on_start = self._generation(options, prompt), partial(room.put, None)
                    ticket = self._scheduler.submit(row, image.image_features, prompt, patient=True, on_start=on_start)
                    pending = Pending(row, ticket, self._tokenizer, options, None, start, *seconds, self._calibration)
                    asked.append(pending)
                while len(answers) < len(asked) and asked[len(answers)].done:
                    answers.append(asked[len(answers)].result())
            return answers + [pending.result() for pending in asked[len(answers) :]]
        except BaseException:
            for pending in asked:
                pending.cancel()
            raise

    def generate(self, image: ImageInput | EncodedImage, prompt: str, *, options: GenerateOptions | None = None) -> Answer:
        """Continue a raw prompt, for example `caption en`; no template is put around it (arguments as in `answer`)."""
        return self.submit(image, prompt=prompt, options=options).result()

    def stream(self, image: ImageInput | EncodedImage, prompt: str, *, options: GenerateOptions | None = None) -> Iterator[str]:
        """Continue a raw prompt, yielding pieces of text that add up to the whole (arguments as in `answer`).

        The prompt is checked at once. From the first piece on the model runs ahead of the reader; closing the iterator
        ends that.
        """
        check_stream(check_options(options, self.manifest.limits.new_tokens))
        self._encode_prompt(prompt)
        encoded = self.encode_image(image)

        def pieces() -> Iterator[str]:  # an iterator that is dropped unread holds no place
            yield from self.submit(encoded, prompt=prompt, options=options, streaming=True).pieces()

        return pieces()

    def prepare_image(self, image: ImageInput | PreparedImage, *, max_pixels: int = MAX_PIXELS) -> PreparedImage:
        """Decode and resize a picture, without the vision encoder; the result is small and is accepted wherever an image is.

        Args:
            image: As in `answer`.
            max_pixels: Larger pictures are refused before they are decoded.

        Raises:
            InputError: The picture cannot be used.
        """
        return self._pictures.prepare(image, max_pixels)

    def encode_image(self, image: ImageInput | EncodedImage) -> EncodedImage:
        """Run the vision encoder once, to ask several questions about the picture (`image` as in `answer`)."""
        encoded = self._pictures.encode([image])[0][0]
        features = np.asarray(encoded.image_features)  # not in a GPU's memory: the caller may keep thousands
        return encoded if features is encoded.image_features else dataclasses.replace(encoded, image_features=features)

    def encode_images(self, images: Sequence[ImageInput | PreparedImage]) -> list[EncodedImage]:
        """Encode pictures, a few in each run, to ask about them soon: unlike `encode_image`, it may leave features on a GPU."""
        most = self._model.together
        parts = (images[first : first + most] for first in range(0, len(images), most))
        return [encoded for part in parts for encoded in self._pictures.encode(part)[0]]

    def _generation(self, options: GenerateOptions, prompt: list[int]) -> Generation | BeamSearch:
        decode, stop = self._tokenizer.decode, options.stop  # not the engine: rows live in the scheduler's thread
        decoder = self._model.decoder
        if options.beams > decoder.slots:
            raise InputError(f"beams is {options.beams}: this engine has room for {decoder.slots}")
        if options.beams > 1 and not decoder.copies:
            raise InputError("beams need the CPU provider: there is no copy within a GPU's cache yet")
        stopped = (lambda ids: any(text in decode(ids) for text in stop)) if stop else None
        limits, tokens = self.manifest.limits, self.manifest.tokens
        ending = Ending(options.max_new_tokens or limits.new_tokens, tokens.eos, stopped)
        return (Generation if options.beams == 1 else BeamSearch)(options, ending, [tokens.image, *prompt])

    def _answer_prompt(self, question: str | None, language: str) -> str:
        return task_prompt(self.manifest, "answer", question or "", language=language)

    def _encode_prompt(self, prompt: str) -> list[int]:
        return self._tokenizer.encode_prompt(prompt, max_tokens=self.manifest.limits.prompt_tokens)

    def _encode_choices(self, choices: Sequence[str] | None) -> list[list[int]] | None:
        if choices is None:
            return None
        return self._tokenizer.encode_choices(
            choices, eos_id=self.manifest.tokens.eos, max_tokens=self.manifest.limits.new_tokens
        )
