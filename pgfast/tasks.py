"""PaliGemma's tasks beside answering: the prompts that it was pretrained with, from the bundle's templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pgfast.errors import PromptError
from pgfast.prompt import fill_template

if TYPE_CHECKING:
    from pgfast.image import ImageInput
    from pgfast.manifest import Manifest
    from pgfast.pending import Pending
    from pgfast.types import Answer, EncodedImage, GenerateOptions

CaptionStyle = Literal["cap", "caption", "describe"]
"""Raw and short as in the web's alt texts; one sentence as in COCO; longer."""


_EMPTY = {
    "answer": "the question is empty: ask something about the picture",
    "question": "the answer is empty: say what the question is for",
}


class Tasks:
    """The tasks of an engine; each is a prompt for `submit`."""

    if TYPE_CHECKING:  # the engine has them

        @property
        def manifest(self) -> Manifest: ...  # noqa: D102

        def submit(self, image: Any, *, prompt: str | None = None, options: GenerateOptions | None = None) -> Pending: ...  # noqa: D102

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
