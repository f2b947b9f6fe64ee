"""Rows and results on their way between processes: JSON in columns of bytes, which runs no code where it is read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pgfast.batch.rows import Failure, Result, Row
from pgfast.types import Answer, Timings


def pack(value: Row | Result) -> bytes:
    """Write a row or a result."""
    return json.dumps(dataclasses.asdict(value)).encode()


def unpack_row(data: bytes) -> Row:
    """Read what `pack` made of a row."""
    return _row(json.loads(data))


def unpack_result(data: bytes) -> Result:
    """Read what `pack` made of a result."""
    raw = json.loads(data)
    answer = raw["answer"]
    if answer is not None:
        tuples = {name: tuple(answer[name]) for name in ("token_ids", "token_logprobs")}
        answer = Answer(**answer | tuples | {"timings": Timings(**answer["timings"])})
    return Result(_row(raw["row"]), answer, _failure(raw["error"]))


def _row(raw: dict[str, Any]) -> Row:
    choices = raw["choices"]
    return Row(**raw | {"choices": None if choices is None else tuple(choices), "error": _failure(raw["error"])})


def _failure(raw: dict[str, str] | None) -> Failure | None:
    return None if raw is None else Failure(**raw)
