"""The actor of a processor: one engine, batches of rows in, batches of rows out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pgfast.errors import InputError
from pgfast.types import Answer, GenerateOptions

if TYPE_CHECKING:
    import pyarrow as pa

ERROR = "__inference_error__"
"""Column with the message of a row that could not be answered, empty in the others; the name is `ray.data.llm`'s."""
ASKED = ("image", "question", "prompt", "choices", "language", "options")
"""What a row says; all but the picture and one of question and prompt may be missing or null."""
TAKEN = ("text", "confidence", "finish_reason", "token_logprobs", "calibrated", "unsure_of")
"""Of the answer, as columns; the last two may be null."""
IN_FLIGHT = 24
"""Questions in an engine at the same time: its 16 slots on a CPU, and pictures that are opened meanwhile."""
RowFunction = Callable[[dict[str, Any]], dict[str, Any]]


class EngineWorker:
    """Loads a bundle and answers batches; Ray Data makes one per actor and calls it from several threads.

    Args:
        bundle: Folder on this node; None: the demo model.
        provider: As in `pgfast.load`.
        threads: CPU threads of the engine.
        preprocess: Row -> what is asked.
        postprocess: Row and answer -> row of the result.
        keep_errors: Rows that cannot be answered stay, with a message.
    """

    def __init__(
        self,
        *,
        bundle: str | None,
        provider: str,
        threads: int,
        preprocess: RowFunction | None,
        postprocess: RowFunction | None,
        keep_errors: bool,
    ) -> None:
        import pgfast

        self._engine = pgfast.load(bundle, provider=provider, threads=threads)
        self._preprocess, self._postprocess, self._keep_errors = preprocess, postprocess, keep_errors
        self._threads = ThreadPoolExecutor(IN_FLIGHT)

    def __call__(self, table: pa.Table) -> pa.Table | dict[str, list[Any]]:
        """Answer the rows of `table`; one row out for each row in, in order.

        Raises:
            InputError: A row cannot be answered, and `keep_errors` is off.
        """
        done = list(self._threads.map(self._answer_row, table.to_pylist()))
        if self._postprocess is None:
            return _joined(table, [answer for _, answer in done])
        results = [row | {ERROR: answer[ERROR]} if answer.get(ERROR) else self._finished(row | answer) for row, answer in done]
        names = dict.fromkeys(name for result in results for name in result)
        return {name: [result.get(name) for result in results] for name in names}

    def _finished(self, row: dict[str, Any]) -> dict[str, Any]:
        assert self._postprocess is not None
        return self._postprocess(row) | ({ERROR: ""} if self._keep_errors else {})

    def _answer_row(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ask one row's question: the row with what `preprocess` added, and the columns of its answer."""
        try:
            asked = row if self._preprocess is None else row | self._preprocess(row)
        except Exception as error:  # it opens files and talks to storage: anything can come
            if not self._keep_errors:
                raise
            return row, _no_answer(error)
        try:
            answer = self._ask(**{name: asked[name] for name in ASKED if asked.get(name) is not None})
        except InputError as error:  # anything else is not the row's fault, and would come with every row
            if not self._keep_errors:
                raise
            return row, _no_answer(error)
        columns = {name: getattr(answer, name) for name in TAKEN}
        columns["choice_probabilities"] = list((answer.choices or {}).values())
        return asked, columns | ({ERROR: ""} if self._keep_errors else {})

    def _ask(
        self,
        image: Any = None,
        question: str | None = None,
        prompt: str | None = None,
        choices: list[str] | None = None,
        language: str = "en",
        options: GenerateOptions | dict[str, Any] | None = None,
    ) -> Answer:
        if image is None or (question is None) == (prompt is None):
            raise InputError("a row needs an image, and either a question or a prompt")
        if isinstance(options, dict):  # from a column, where what is not set is null
            try:
                options = GenerateOptions(**{name: value for name, value in options.items() if value is not None})
            except TypeError as error:
                raise InputError(f"options: {error}") from error
        pending = self._engine.submit(image, question, prompt=prompt, choices=choices, language=language, options=options)
        return pending.result()


def _no_answer(error: Exception) -> dict[str, Any]:
    message = str(error) or type(error).__name__
    empty = {"text": "", "confidence": 0.0, "finish_reason": "", "token_logprobs": [], "choice_probabilities": []}
    return {**empty, "calibrated": None, "unsure_of": None, ERROR: message}


def _joined(table: pa.Table, answers: list[dict[str, Any]]) -> pa.Table:
    """The table's own columns as they are, and the answers' with types that do not depend on the batch."""
    import pyarrow as pa

    numbers = pa.list_(pa.float64())
    types = {"text": pa.string(), "confidence": pa.float64(), "finish_reason": pa.string()}
    types |= {"token_logprobs": numbers, "calibrated": pa.float64(), "unsure_of": pa.string()}
    types |= {"choice_probabilities": numbers}
    types |= {ERROR: pa.string()} if answers and ERROR in answers[0] else {}
    kept = table.drop_columns([name for name in types if name in table.column_names])
    columns = [pa.array([answer[name] for answer in answers], kind) for name, kind in types.items()]
    return pa.table([*kept.columns, *columns], names=[*kept.column_names, *types])
