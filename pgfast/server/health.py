"""/healthz: the process lives. /readyz: it wants requests."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from .config import ServerConfig
from .service import AnswerService


def routes(service: AnswerService, config: ServerConfig) -> list[BaseRoute]:
    """The routes of this file."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    return [Route("/healthz", healthz)]
