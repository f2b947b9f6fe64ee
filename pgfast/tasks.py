"""PaliGemma's tasks beside answering: the prompts that it was pretrained with, from the bundle's templates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pgfast.errors import InputError, PromptError
from pgfast.locations import Objects, box_in_pixels, parse_tokens
from pgfast.masks import MaskDecoder, place
from pgfast.prompt import fill_template
from pgfast.types import Detection, Detections, EncodedImage, Segment, Segments

if TYPE_CHECKING:
    from pgfast.image import ImageInput
    from pgfast.manifest import Manifest
    from pgfast.pending import Pending
    from pgfast.prompt import Tokenizer
    from pgfast.types import Answer, GenerateOptions, PreparedImage

CaptionStyle = Literal["cap", "caption", "describe"]
"""Raw and short as in the web's alt texts; one sentence as in COCO; longer."""


_EMPTY = {
    "answer": "the question is empty: ask something about the picture",
    "question": "the answer is empty: say what the question is for",
}


class Tasks:
    """The tasks of an engine; each is a prompt for `submit`."""

    if TYPE_CHECKING:  # the engine has them
        _tokenizer: Tokenizer
        _masks: MaskDecoder

        @property
        def manifest(self) -> Manifest: ...  # noqa: D102

        def submit(self, image: Any, *, prompt: str | None = None, options: GenerateOptions | None = None) -> Pending: ...  # noqa: D102

        def prepare_image(self, image: ImageInput | PreparedImage) -> PreparedImage: ...  # noqa: D102

    def caption(
        self,
        image: ImageInput | EncodedImage,
        *,
        style: CaptionStyle = "caption",
        language: str = "en",
        options: GenerateOptions | None = None,
    ) -> Answer:
        """Describe a picture, or the frames of a short video.

        Args:
            image: As in `Engine.answer`.
            style: `cap` (raw, short), `caption` (one sentence) or `describe` (longer).
            language: Code of the caption's language.
            options: How to decode.

        Raises:
            InputError: The picture, the language or an option cannot be used.
        """
        if style not in ("cap", "caption", "describe"):
            raise PromptError(f"style is cap, caption or describe, not {style!r}")
        return self.submit(image, prompt=task_prompt(self.manifest, style, language=language), options=options).result()

    def ocr(self, image: ImageInput | EncodedImage, *, options: GenerateOptions | None = None) -> Answer:
        """Read the text in a picture (arguments as in `caption`)."""
        return self.submit(image, prompt=task_prompt(self.manifest, "ocr"), options=options).result()

    def question(
        self,
        image: ImageInput | EncodedImage,
        answer: str,
        *,
        language: str = "en",
        options: GenerateOptions | None = None,
    ) -> Answer:
        """Make up a question about a picture that has this answer (arguments as in `caption`)."""
        prompt = task_prompt(self.manifest, "question", answer, language=language)
        return self.submit(image, prompt=prompt, options=options).result()

    def detect(
        self,
        image: ImageInput | EncodedImage,
        labels: str | Sequence[str],
        *,
        options: GenerateOptions | None = None,
    ) -> Detections:
        """Find objects in a picture.

        Args:
            image: One picture, as in `Engine.answer`.
            labels: What to look for: a list of labels, or one text with `;` between them.
            options: How to decode.

        Raises:
            InputError: The picture, a label or an option cannot be used.
        """
        answer, objects, width, height = self._locate(image, "detect", labels, options)
        found = (Detection(o.label, box_in_pixels(o.bins, width, height), o.score or 0.0) for o in objects.objects)
        return Detections(found, answer=answer, width=width, height=height, problems=objects.problems)

    def segment(
        self,
        image: ImageInput | EncodedImage,
        labels: str | Sequence[str],
        *,
        options: GenerateOptions | None = None,
    ) -> Segments:
        """Find objects in a picture, with their masks (arguments as in `detect`).

        A bundle without a mask decoder gives boxes alone; `pgfast export --mask-decoder` adds one.

        Raises:
            InputError: The picture, a label or an option cannot be used.
            BundleError: The mask decoder does not load.
        """
        answer, objects, width, height = self._locate(image, "segment", labels, options)
        codes = [o.codes for o in objects.objects if o.codes] if self._masks.present else []
        masks = iter(self._masks.decode(codes) if codes else ())
        found = []
        for o in objects.objects:
            box = box_in_pixels(o.bins, width, height)
            mask = place(next(masks), box, width, height) if codes and o.codes else None
            found.append(Segment(o.label, box, o.score or 0.0, mask))
        return Segments(found, answer=answer, width=width, height=height, problems=objects.problems)

    def _locate(
        self, image: ImageInput | EncodedImage, task: str, labels: str | Sequence[str], options: GenerateOptions | None
    ) -> tuple[Answer, Objects, int, int]:
        """Ask for objects; also returns width and height of the picture in pixels."""
        listed = split_labels(labels)
        prompt = task_prompt(self.manifest, task, " ; ".join(listed))
        start = time.perf_counter()
        picture = image if isinstance(image, EncodedImage) else self.prepare_image(image)
        prepared = time.perf_counter() - start
        tokens = self.manifest.dimensions.num_image_tokens
        if isinstance(picture, EncodedImage) and picture.image_features.shape[1:2] > (tokens,):
            raise InputError(f"{task} takes one picture: boxes would not say which of several they belong to")
        answer = self.submit(picture, prompt=prompt, options=options).result()
        t = answer.timings
        times = {"preprocess": t.preprocess + prepared, "ttft": t.ttft + prepared, "total": t.total + prepared}
        answer = dataclasses.replace(answer, timings=dataclasses.replace(t, **times))
        # models that know one object only may leave out its name (big_vision's RefCOCO transfers do)
        label = listed[0] if len(listed) == 1 else ""
        objects = parse_tokens(
            answer.token_ids, answer.token_logprobs, self._tokenizer, default_label=label, masks=task == "segment"
        )
        if answer.finish_reason == "length":
            cut = f"the answer was cut off after {len(answer.token_ids)} tokens: its end may be wrong, objects may be missing"
            objects = Objects(objects.objects, (*objects.problems, cut))
        if answer.unsure_of is not None:
            objects = Objects((), ("the answer is less sure than min_confidence: none of its objects are taken",))
        return answer, objects, picture.width, picture.height


def split_labels(labels: str | Sequence[str]) -> list[str]:
    """Return the labels of a list, or of a text with `;` between them.

    Raises:
        PromptError: There is none, or one is empty, no text, or (in a list) holds the separator.
    """
    given: Sequence[str] = labels.split(";") if isinstance(labels, str) else labels
    if not isinstance(given, Sequence) or not all(isinstance(label, str) for label in given):
        raise PromptError("labels is a text such as 'cat ; dog', or a list of texts")
    listed = [label.strip() for label in given]
    if not listed or not all(listed):
        raise PromptError("a label is empty: say what to look for, for example 'cat ; dog'")
    if wrong := next((label for label in listed if ";" in label), None):
        raise PromptError(f"the label {wrong[:40]!r} contains ';', which separates labels: give each label alone")
    return listed


def task_prompt(manifest: Manifest, task: str, text: str = "", *, language: str = "en") -> str:
    """Fill the bundle's template of a task.

    Args:
        manifest: Has the templates, and the languages that they may name.
        task: For example `caption`.
        text: The question, the labels or the answer.
        language: A code.

    Raises:
        PromptError: There is no such task, the text is empty, or the model was not trained with the language.
    """
    template = manifest.prompts.get(task)
    if template is None:
        raise PromptError(f"this bundle has no prompt for {task!r}, only for {', '.join(sorted(manifest.prompts))}")
    if "{text}" in template and (not isinstance(text, str) or not text.strip()):
        raise PromptError(_EMPTY.get(task, "the labels are empty: say what to look for"))
    if not isinstance(language, str):
        raise PromptError(f"language is a code such as 'en', not {language!r}")
    if "{language}" in template and language not in manifest.languages:
        raise PromptError(f"the model was not trained with the language {language!r}: one of {', '.join(manifest.languages)}")
    return fill_template(template, text=text.strip(), language=language)
