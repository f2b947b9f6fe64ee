"""/healthz: the process lives. /readyz: it wants requests. /metrics: what it has done."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from .config import ServerConfig
from .service import AnswerService


def routes(service: AnswerService, config: ServerConfig) -> list[BaseRoute]:
    """The routes of this file."""

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        if service.admission.draining:
            return PlainTextResponse("stopping\n", 503)
        if not service.admission.ready:
            return PlainTextResponse("starting\n", 503)
        return PlainTextResponse("ready\n")

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]
