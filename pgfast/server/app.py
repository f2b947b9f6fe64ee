"""The ASGI application: routes inside, limits around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware

from . import answer_api, health
from .access import Access
from .admission import Admit
from .config import ServerConfig
from .http_errors import HANDLERS
from .metrics import CountRequests
from .service import AnswerService

if TYPE_CHECKING:
    from pgfast.engine import Engine


def build_app(engine: Engine, config: ServerConfig) -> Starlette:
    """Put an engine behind HTTP.

    Args:
        engine: Answers; stays the caller's to close.
        config: Limits.

    Returns:
        The application; `app.state.service` is its `AnswerService`.
    """
    service = AnswerService(engine, config)
    routes = [
        # in the order of their use: they are tried one after the other
        *answer_api.routes(service, config),
        *health.routes(service, config),
    ]
    middleware = [
        Middleware(CountRequests, service.metrics, routes),
        Middleware(Access, config),
        Middleware(Admit, service.admission, config),
    ]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.service = service
    return app
