"""POST /v1/answer."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from pgfast.types import Answer, GenerateOptions

from .bodies import decode_picture, off_loop, parse_json, read_body
from .config import ServerConfig
from .http_errors import ApiError, api_error
from .service import AnswerService, Ask, with_disconnect


class RemotePicture(BaseModel):
    """A picture that the server fetches, from the hosts that it was allowed to."""

    model_config = ConfigDict(extra="forbid", strict=True)
    url: str


class AnswerRequest(BaseModel):
    """The body of POST /v1/answer."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    image: str | RemotePicture
    """The picture file as base64 or as a data URI, or where to fetch it."""
    question: str | None = None
    prompt: str | None = None
    choices: list[str] | None = Field(None, max_length=256)
    language: str = "en"
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] = Field([], max_length=16)

    def ask(self, picture: bytes) -> Ask:
        """The question to the service."""
        if (self.question is None) == (self.prompt is None):
            raise ApiError(400, "invalid_request", "give a question, or a prompt, and not both")
        options = GenerateOptions(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed, tuple(self.stop))
        choices = tuple(self.choices) if self.choices is not None else None
        return Ask(picture, self.question, self.prompt, choices, self.language, options)


def routes(service: AnswerService, config: ServerConfig) -> list[BaseRoute]:
    """The routes of this file."""

    async def answer(request: Request) -> Response:
        body = await read_body(request, config.max_body)
        ask = await off_loop(len(body), _read_json, body)
        if request.query_params.get("stream") in ("1", "true"):
            return StreamingResponse(_events(service, ask), media_type="text/event-stream")
        return Response(
            answer_json(service, await with_disconnect(request, service.answer(ask))), media_type="application/json"
        )

    return [Route("/v1/answer", answer, methods=["POST"])]


def _read_json(body: bytes) -> Ask:
    read = parse_json(AnswerRequest, body)
    if isinstance(read.image, RemotePicture):
        raise ApiError(400, "image_error", "pictures are not fetched from URLs here: send the picture itself, as base64")
    return read.ask(decode_picture(read.image))


def answer_json(service: AnswerService, answer: Answer) -> bytes:
    """The response's body."""
    timings = dataclasses.asdict(answer.timings)
    found: dict[str, Any] = {
        "id": f"answer-{uuid.uuid4().hex}",
        "model": service.model,
        "text": answer.text,
        "confidence": answer.confidence,
        "token_logprobs": answer.token_logprobs,
        "finish_reason": answer.finish_reason,
        "choices": answer.choices,
        "timings": timings,
    }
    return json.dumps(found, ensure_ascii=False).encode()


async def _events(service: AnswerService, ask: Ask) -> AsyncGenerator[bytes]:
    try:
        async for piece in service.stream(ask):
            if isinstance(piece, str):
                yield b"event: piece\ndata: %b\n\n" % json.dumps({"text": piece}).encode()
            else:
                yield b"event: answer\ndata: %b\n\n" % answer_json(service, piece)
    except Exception as error:  # noqa: BLE001 - the status is sent already
        yield b"event: error\ndata: %b\n\n" % api_error(error).body()
