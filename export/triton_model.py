"""pgfast behind Triton's Python backend: `pgfast export --layout triton` puts this file into the repository as `model.py`.

One request holds one or more rows, each a picture and a question. All rows of all requests of a call are answered together; an
error fails its request alone. Triton must be able to import pgfast (the version that wrote the repository, or a newer one).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

import pgfast
from pgfast.errors import InputError, OverloadedError, PgfastError

logger = logging.getLogger("pgfast.triton")

POLL = 0.05
"""Seconds between two looks at whether a client has gone away."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A request whose rows are being answered."""

    request: Any
    rows: list[Future[pgfast.Answer]]
    cancelled: threading.Event


class TritonPythonModel:
    """What the Python backend makes one of per instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that lies beside this file; `parameters` of config.pbtxt say where it runs."""
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._engine = pgfast.load(
            Path(args["model_repository"]) / args["model_version"] / "bundle",
            provider=settings["provider"],
            threads=int(settings["threads"]) if "threads" in settings else None,
            device_id=int(args["model_instance_device_id"]),
        )
        # a thread per row: each encodes its picture, and those that wait share a run
        self._pool = ThreadPoolExecutor(max(1, config["max_batch_size"]), "pgfast-row")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests; the responses are in their order."""
        works = [self._start(request) for request in requests]
        waiting = [row for work in works for row in work.rows]
        while waiting:
            _, unfinished = wait(waiting, timeout=POLL)
            for work in works:
                unfinished_rows = not work.cancelled.is_set() and not unfinished.isdisjoint(work.rows)
                if unfinished_rows and work.request.is_cancelled():
                    work.cancelled.set()
            waiting = list(unfinished)
        return [_respond(work) for work in works]

    def finalize(self) -> None:
        """End the engine's thread."""
        self._pool.shutdown()
        self._engine.close()

    def _start(self, request: Any) -> _Work:
        cancelled = threading.Event()
        try:
            rows = _read(request)
        except UnicodeDecodeError as error:
            failed: Future[pgfast.Answer] = Future()
            failed.set_exception(error)
            return _Work(request, [failed], cancelled)
        return _Work(request, [self._pool.submit(self._answer, cancelled, **row) for row in rows], cancelled)

    def _answer(
        self, cancelled: threading.Event, image: bytes, question: str, choices: list[str] | None, max_new_tokens: int | None
    ) -> pgfast.Answer:
        options = pgfast.GenerateOptions(max_new_tokens=max_new_tokens)
        pending = self._engine.submit(image, question, choices=choices, options=options)
        while True:
            if cancelled.is_set():
                pending.cancel()
            with contextlib.suppress(TimeoutError):
                return pending.result(POLL)


def _read(request: Any) -> list[dict[str, Any]]:
    """The rows of a request; every input has one line per row."""

    def rows_of(name: str) -> NDArray[Any] | None:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    images, questions, choices, most = map(rows_of, ("image", "question", "choices", "max_new_tokens"))
    assert images is not None
    assert questions is not None
    return [
        {
            "image": images[i, 0],
            "question": questions[i, 0].decode(),
            "choices": None if choices is None else [choice.decode() for choice in choices[i]],
            "max_new_tokens": None if most is None else int(most[i, 0]),
        }
        for i in range(len(images))
    ]


def _respond(work: _Work) -> Any:
    """The answers of a request's rows, or the first error among them."""
    if work.cancelled.is_set():
        return _error("the request was cancelled", pb_utils.TritonError.CANCELLED)
    answers = []
    for i, row in enumerate(work.rows):
        where = f"row {i}: " if len(work.rows) > 1 else ""
        try:
            answers.append(row.result())
        except UnicodeDecodeError:
            return _error("texts are UTF-8", pb_utils.TritonError.INVALID_ARG)
        except InputError as error:
            return _error(f"{where}{error}", pb_utils.TritonError.INVALID_ARG)
        except OverloadedError as error:
            return _error(f"{where}{error}", pb_utils.TritonError.UNAVAILABLE)
        except PgfastError as error:
            return _error(f"{where}{error}", pb_utils.TritonError.INTERNAL)
        except Exception:
            logger.exception("a request failed")  # Triton shows what its Python backends write to stderr
            return _error("pgfast failed; Triton's log says why", pb_utils.TritonError.INTERNAL)
    columns = {
        "text": np.array([[answer.text.encode()] for answer in answers], np.object_),
        "confidence": np.array([[answer.confidence] for answer in answers], np.float32),
        "finish_reason": np.array([[answer.finish_reason.encode()] for answer in answers], np.object_),
    }
    if answers[0].choices is not None:  # in the order in which they were given
        columns["choice_probabilities"] = np.array([list((answer.choices or {}).values()) for answer in answers], np.float32)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in columns.items()])


def _error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse([], pb_utils.TritonError(message, code))
