"""POST /v1/chat/completions and GET /v1/models, for OpenAI's clients."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from pgfast.pending import Pending

from .bodies import decode_picture, off_loop, parse_json, read_body
from .chat_reply import Reply
from .chat_schema import ChatRequest, ModelCard, ModelList
from .config import ServerConfig
from .http_errors import ApiError, api_error
from .service import AnswerService, Ask, with_disconnect


def routes(service: AnswerService, config: ServerConfig) -> list[BaseRoute]:
    """The routes of this file."""
    manifest = service.engine.manifest
    card = ModelCard(id=service.model, created=int(time.time()), owned_by="pgfast")
    fingerprint = f"fp_{manifest.digest()[:12]}"

    def reply(asked: ChatRequest, pending: Pending) -> Reply:
        image_tokens = manifest.dimensions.num_image_tokens
        return Reply(asked, pending, model=card.id, fingerprint=fingerprint, image_tokens=image_tokens)

    async def complete(request: Request) -> Response:
        body = await read_body(request, config.max_body)
        asked, ask = await off_loop(len(body), _read, body, card.id, manifest.limits.new_tokens)
        progress = service.follow(ask, streaming=bool(asked.stream))
        if not asked.stream:
            pending = await with_disconnect(request, _last(progress))
            return Response(reply(asked, pending).whole(pending.result(0)), media_type="application/json")
        # up to the first token errors have a status of their own
        pending = await with_disconnect(request, anext(progress))
        return StreamingResponse(_events(reply(asked, pending), pending, progress), media_type="text/event-stream")

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


def _read(body: bytes, model: str, most: int) -> tuple[ChatRequest, Ask]:
    asked = parse_json(ChatRequest, body)
    _check_model(asked.model, model)
    picture = decode_picture(asked.picture_url)
    text = {"prompt": asked.text} if asked.raw_prompt else {"question": asked.text}
    choices = None if asked.choices is None else tuple(asked.choices)
    return asked, Ask(picture, **text, choices=choices, language=asked.language, options=asked.options(most))


async def _last(progress: AsyncGenerator[Pending]) -> Pending:
    return [pending async for pending in progress][-1]


async def _events(reply: Reply, pending: Pending, progress: AsyncGenerator[Pending]) -> AsyncGenerator[bytes]:
    async with aclosing(progress):
        try:
            yield reply.begin() + reply.news()
            async for _ in progress:
                if news := reply.news():
                    yield news
            yield reply.end(pending.result(0))
        except Exception as error:  # noqa: BLE001 - the status is sent already
            yield b"data: %b\n\n" % api_error(error).body()
