"""A record as token ids: the template, the tokenizer, and all that would teach something else than meant."""

from __future__ import annotations

from dataclasses import dataclass

from pgfast.errors import PromptError
from pgfast.prompt import SEPARATOR, Tokenizer, fill_template

from .data.records import Record, RowError
from .sequence import Example


@dataclass(frozen=True, slots=True)
class Encoder:
    """Record -> `Example`.

    Args:
        tokenizer: The base model's.
        eos_id: Ends every answer.
        template: Put around questions (`TrainConfig.prompt`).
        language: What `{language}` becomes.
        max_prompt_tokens: `<bos>` and newline included.
        max_answer_tokens: `<eos>` included.
        cut_answers: Cut longer answers instead of refusing them.
        cycle: Teach each of a record's answers in turn, not the most common one alone.
    """

    tokenizer: Tokenizer
    eos_id: int
    template: str
    language: str
    max_prompt_tokens: int
    max_answer_tokens: int
    cut_answers: bool
    cycle: bool = False

    def taught(self, record: Record) -> tuple[str, ...]:
        """Return the answers that training will use: the most common one, or with `cycle` all that say something."""
        return (self.cycle and tuple(answer for answer in record.answers if answer.strip())) or (record.answer,)

    def prompt(self, record: Record) -> list[int]:
        """Return `<bos>`, prompt and newline.

        Raises:
            RowError: The text is empty, too long, holds a marker, or brings the newline that is added here.
        """
        text = record.text
        if not record.is_prompt:
            text = fill_template(self.template, text=text, language=self.language)
        if text.endswith(SEPARATOR):
            raise RowError("the prompt ends with a newline: pgfast adds it, so there would be two")
        try:
            return self.tokenizer.encode_prompt(text, max_tokens=self.max_prompt_tokens)
        except PromptError as error:
            raise RowError(str(error)) from error

    def answer(self, text: str, *, may_be_empty: bool = False) -> list[int]:
        """Return the answer's ids and `<eos>`; a cut answer has no `<eos>`, so that its end is not taught.

        Raises:
            RowError: The answer is empty or too long, or holds a marker other than `<loc>` and `<seg>`.
        """
        if not text.strip():
            if may_be_empty:
                return [self.eos_id]
            raise RowError("the answer is empty")
        try:
            ids = [*self.tokenizer.encode_suffix(text, locations=True), self.eos_id]
        except PromptError as error:
            raise RowError(f"the answer cannot be used: {error}") from error
        if len(ids) > self.max_answer_tokens:
            if not self.cut_answers:
                most = self.max_answer_tokens
                raise RowError(f"the answer has {len(ids)} tokens: at most {most} (--max-answer-tokens, --cut-answers)")
            ids = ids[: self.max_answer_tokens]
        return ids

    def __call__(self, record: Record, answer: str | None = None) -> Example:
        """Return the example for one of the record's answers (None: the most common one).

        Raises:
            RowError: What `prompt` and `answer` refuse.
        """
        text = record.answer if answer is None else answer
        return Example(self.prompt(record), self.answer(text, may_be_empty=may_be_empty(record)))

    def check(self, record: Record) -> int:
        """Look at a record with the answers that are taught; return how many of them would be cut.

        Raises:
            RowError: It cannot be trained on.
        """
        self.prompt(record)
        suffixes = [self.answer(text, may_be_empty=may_be_empty(record)) for text in set(self.taught(record))]
        return sum(ids[-1] != self.eos_id for ids in suffixes)


def may_be_empty(record: Record) -> bool:
    """Say whether nothing at all can be the right answer: what is looked for is not in the picture."""
    return record.is_prompt and record.text.startswith(("detect ", "segment "))
