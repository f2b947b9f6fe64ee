"""The ASGI application: routes inside, limits around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette

from . import answer_api, health
from .config import ServerConfig
from .http_errors import HANDLERS
from .service import AnswerService

if TYPE_CHECKING:
    from .interim import Engine


def build_app(engine: Engine, config: ServerConfig) -> Starlette:
    """Put an engine behind HTTP.

    Args:
        engine: Answers; stays the caller's to close.
        config: Limits.
    """
    service = AnswerService(engine, config)
    routes = [
        *health.routes(service, config),
        *answer_api.routes(service, config),
    ]
    return Starlette(routes=routes, exception_handlers=HANDLERS)
