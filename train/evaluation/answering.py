"""The answers of a bundle or of a checkpoint to all questions of a data set, in chunks, so that pictures never pile up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pgfast.errors import InputError
from pgfast.types import GenerateOptions

from ..data.records import Dataset, Record, RowError
from .predictions import Answers, Asked, Prediction

if TYPE_CHECKING:
    from pgfast.engine import Engine

    from .transformers_model import TransformersModel

CHUNK = 128
"""Questions that are asked together: enough that the end of a chunk, where the batch runs empty, costs little."""
PROMPT_THREADS = 16
"""Raw prompts asked at the same time: the places of the running batch on a CPU."""
Progress = Callable[[int, int], None]
"""Called with (done, total) questions after every chunk."""
BAD = (InputError, RowError)
"""What a row does that cannot be answered: its picture, its text, or the row itself cannot be used."""


def answer_with_bundle(
    engine: Engine,
    dataset: Dataset,
    *,
    limit: int | None = None,
    language: str = "en",
    options: GenerateOptions | None = None,
    skip_bad: bool = False,
    on_progress: Progress | None = None,
) -> Answers:
    """Answer a data set's questions with a loaded bundle, greedily by default.

    Args:
        engine: The bundle.
        dataset: The questions; raw prompts go to the model as they are, the others through the bundle's template.
        limit: Answer only the first so many rows.
        language: What the template's `{language}` becomes.
        options: How to decode.
        skip_bad: Count rows that cannot be answered, and answer them with an empty text, instead of stopping.
        on_progress: Told how far it is.

    Raises:
        InputError: A row cannot be answered (the message names it), or two rows have the same id.
    """

    def ask(chunk: Sequence[Asked]) -> list[Prediction]:
        # one object per picture, so that the engine encodes it once
        images: dict[str, Any] = {}
        for row, record in chunk:
            if record.picture not in images:
                images[record.picture] = dataset.image(row)
        if chunk[0][1].is_prompt:
            answers = _generate(engine, chunk, images, options)
        else:
            pairs = [(images[record.picture], record.text) for _, record in chunk]
            answers = engine.answer_batch(pairs, language=language, options=options)
        return [Prediction(answer.text, answer.confidence) for answer in answers]

    return _answer_all(ask, dataset, limit, skip_bad, on_progress)


def answer_with_checkpoint(
    model: TransformersModel,
    dataset: Dataset,
    *,
    limit: int | None = None,
    language: str = "en",
    skip_bad: bool = False,
    on_progress: Progress | None = None,
) -> Answers:
    """Answer a data set's questions with a checkpoint in transformers (arguments and errors as in `answer_with_bundle`)."""

    def ask(chunk: Sequence[Asked]) -> list[Prediction]:
        return model.answer(chunk, dataset.image, language=language)

    return _answer_all(ask, dataset, limit, skip_bad, on_progress)


def _generate(engine: Engine, chunk: Sequence[Asked], images: dict[str, Any], options: GenerateOptions | None) -> list[Any]:
    """Continue raw prompts from several threads, which share the running batch; a picture's prompts follow each other."""
    groups = [list(group) for _, group in groupby(chunk, key=lambda asked: asked[1].picture)]

    def one_picture(group: list[Asked]) -> list[Any]:
        encoded = engine.encode_image(images[group[0][1].picture])
        return [engine.generate(encoded, record.text, options=options) for _, record in group]

    with ThreadPoolExecutor(PROMPT_THREADS) as pool:
        return [answer for answers in pool.map(one_picture, groups) for answer in answers]


def _answer_all(
    ask: Callable[[Sequence[Asked]], list[Prediction]],
    dataset: Dataset,
    limit: int | None,
    skip_bad: bool,
    on_progress: Progress | None,
) -> Answers:
    result = Answers()

    def refuse(row: int, record: Record | None, error: Exception) -> None:
        if not skip_bad:
            which = f"row {row}" if record is None or record.id == row else f"row {row} (question {record.id})"
            raise InputError(f"{which} of {dataset.name}: {error}; skip_bad (--skip-bad) goes on without such rows") from error
        result.skipped[row] = str(error)

    total = len(dataset) if limit is None else min(limit, len(dataset))
    order = _order(dataset, total, refuse)
    found: dict[int, Prediction] = {}
    for start in range(0, len(order), CHUNK):
        chunk = [(row, dataset.record(row)) for row in order[start : start + CHUNK]]
        for is_prompt in (False, True):
            part = [asked for asked in chunk if asked[1].is_prompt == is_prompt]
            if part:
                found.update(_ask_all(ask, part, refuse))
        if on_progress is not None:
            on_progress(start + len(chunk) + total - len(order), total)
    result.predictions = dict(sorted(found.items()))
    result.skipped = dict(sorted(result.skipped.items()))
    return result


def _order(dataset: Dataset, total: int, refuse: Callable[[int, Record | None, Exception], None]) -> list[int]:
    """Rows by picture, so that those of one picture are asked together."""
    pictures: dict[int, str] = {}
    ids: dict[int | str, int] = {}
    for row in range(total):
        try:
            record = dataset.record(row)
        except RowError as error:
            refuse(row, None, error)
            continue
        if (first := ids.setdefault(record.id, row)) != row:
            raise InputError(
                f"rows {first} and {row} of {dataset.name} have the same question id {record.id}: make them differ"
            )
        pictures[row] = record.picture
    return sorted(pictures, key=lambda row: pictures[row])


def _ask_all(
    ask: Callable[[Sequence[Asked]], list[Prediction]],
    chunk: Sequence[Asked],
    refuse: Callable[[int, Record | None, Exception], None],
) -> dict[int, Prediction]:
    """Ask together; what is refused as a whole is halved until the rows that are to blame stand alone."""
    try:
        return dict(zip((row for row, _ in chunk), ask(chunk), strict=True))
    except BAD as error:
        if len(chunk) == 1:
            refuse(*chunk[0], error)
            return {chunk[0][0]: Prediction("", None)}
    half = len(chunk) // 2
    return _ask_all(ask, chunk[:half], refuse) | _ask_all(ask, chunk[half:], refuse)
