"""POST /v1/chat/completions and GET /v1/models, for OpenAI's clients."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from pgfast.pending import Pending

from .bodies import decode_picture, off_loop, parse_json, read_body
from .chat_answer_schema import ModelCard, ModelList
from .chat_reply import Reply
from .chat_schema import ChatRequest
from .config import ServerConfig
from .http_errors import ApiError
from .service import AnswerService, Ask
from .streams import EventStream


def routes(service: AnswerService, config: ServerConfig) -> list[BaseRoute]:
    """The routes of this file."""
    manifest = service.engine.manifest
    card = ModelCard(id=service.model, created=int(time.time()), owned_by="pgfast")
    fingerprint = f"fp_{manifest.digest()[:12]}"

    def reply(asked: ChatRequest, pending: Pending) -> Reply:
        image_tokens = manifest.dimensions.num_image_tokens
        return Reply(asked, pending, model=card.id, fingerprint=fingerprint, image_tokens=image_tokens)

    async def complete(request: Request) -> Any:
        asked, ask = await _read(request, service, config)
        progress = service.follow(ask, streaming=bool(asked.stream))
        if asked.stream:
            return EventStream(_events(progress, asked, reply), b"data: %b\n\n")
        async with aclosing(progress):
            pending = await anext(progress)
            return Response(reply(asked, pending).whole(pending.result(0)), media_type="application/json")

    async def models(request: Request) -> Response:
        return Response(ModelList(data=[card]).model_dump_json(), media_type="application/json")

    async def model(request: Request) -> Response:
        _check_model(request.path_params["id"], card.id)
        return Response(card.model_dump_json(), media_type="application/json")

    return [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
    ]


def _check_model(asked: str, model: str) -> None:
    if asked != model:
        raise ApiError(404, "model_not_found", f"the model here is {model!r}", param="model")


async def _read(request: Request, service: AnswerService, config: ServerConfig) -> tuple[ChatRequest, Ask]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "send application/json")
    body = await read_body(request, config.max_body)
    asked, picture = await off_loop(len(body), _parse, body)
    _check_model(asked.model, service.model)
    if picture is None:
        picture = await service.fetch_picture(asked.picture_url)
    choices = None if asked.choices is None else tuple(asked.choices)
    question, prompt = (None, asked.text) if asked.raw_prompt else (asked.text, None)
    options = asked.options(service.engine.manifest.limits.new_tokens)
    return asked, Ask(picture, question, prompt, choices, asked.language, options)


def _parse(body: bytes) -> tuple[ChatRequest, bytes | None]:
    asked = parse_json(ChatRequest, body)
    return asked, None if asked.picture_url.lower().startswith(("https:", "http:")) else decode_picture(asked.picture_url)


async def _events(
    progress: AsyncGenerator[Pending], asked: ChatRequest, reply: Callable[[ChatRequest, Pending], Reply]
) -> AsyncGenerator[bytes]:
    async with aclosing(progress):
        pending = await anext(progress)
        found = reply(asked, pending)
        yield found.begin() + found.news()
        async for _ in progress:
            if news := found.news():
                yield news
        yield found.end(pending.result(0))
