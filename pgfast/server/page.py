"""The page at `/`: plain HTML, CSS and modules of this package, no other host."""

from __future__ import annotations

import hashlib
import html
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

if TYPE_CHECKING:
    from .config import ServerConfig
    from .service import AnswerService

FILES = Path(__file__).parent / "page_files"
EXAMPLE = Path(__file__).parents[1] / "demo" / "blue_circle.png"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png"}
PARTS = (".css", ".js", ".svg")

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # asked for again each time, answered 304: the files have no version in their names
    "Cache-Control": "no-cache",
}


def routes(service: AnswerService, config: ServerConfig) -> list[BaseRoute]:
    """Return the routes of the page: `/` and its files under `/page/`.

    Args:
        service: Whose model the page names.
        config: Whose limits the page keeps to, so that large pictures are made smaller before they are sent.
    """
    index = Template((FILES / "index.html").read_text(encoding="utf-8")).substitute(
        max_body=config.max_body, max_pixels=config.max_pixels, model=html.escape(service.model)
    )
    return [
        _route("/", index.encode(), ".html"),
        _route("/page/example.png", EXAMPLE.read_bytes(), ".png"),
        *(
            _route(f"/page/{path.name}", path.read_bytes(), path.suffix)
            for path in sorted(FILES.iterdir())
            if path.suffix in PARTS
        ),
    ]


def _route(address: str, content: bytes, suffix: str) -> Route:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": etag}

    async def serve(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        # a proxy that compresses makes the tag weak
        if any(tag.strip().removeprefix("W/") in (etag, "*") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=MEDIA_TYPES[suffix], headers=headers)

    return Route(address, serve, methods=["GET"], include_in_schema=False)
