"""GET /openapi.json: the description of the whole server, for programs and for people."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import pgfast

from .answer_api import AnswerFields, AnswerRequest
from .chat_answer_schema import ChatCompletion, ChatCompletionChunk, ModelCard, ModelList
from .chat_schema import ChatRequest
from .config import ServerConfig
from .openapi_errors import responses
from .openapi_models import AnswerBody, ErrorBody
from .openapi_operations import paths
from .service import AnswerService

_REQUESTS: tuple[type[BaseModel], ...] = (AnswerRequest, ChatRequest)
_RESPONSES: tuple[type[BaseModel], ...] = (
    AnswerBody,
    ChatCompletion,
    ChatCompletionChunk,
    ErrorBody,
    ModelCard,
    ModelList,
)
TAGS = {
    "answer": "Questions about pictures.",
    "openai": "The same for OpenAI's clients: base URL `/v1`.",
    "operation": "For whoever runs the server.",
}


def routes(service: AnswerService, config: ServerConfig) -> list[BaseRoute]:
    """The routes of this file."""
    content = json.dumps(document(service.model, config), ensure_ascii=False).encode()

    async def openapi(_: Request) -> Response:
        return Response(content, media_type="application/json")

    return [Route("/openapi.json", openapi)]


def document(model: str, config: ServerConfig) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server.

    Args:
        model: The model's name.
        config: Whose limits and keys it describes.
    """
    bearer = {"type": "http", "scheme": "bearer", "description": "A key of the file that `--api-key-file` names."}
    security: list[dict[str, Any]] = [{"bearer": []}] if config.api_keys else [{}, {"bearer": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pgfast",
            "version": pgfast.__version__,
            "summary": "Answers questions about pictures.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths(model, config.max_body, security),
        "components": {
            "schemas": _schemas(),
            "responses": responses(),
            "securitySchemes": {"bearer": bearer},
        },
    }


def _schemas() -> dict[str, Any]:
    asked: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in _REQUESTS]
    told: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "serialization") for model in _RESPONSES]
    found: dict[str, Any] = models_json_schema(asked + told, ref_template="#/components/schemas/{model}")[1]["$defs"]
    request = found["AnswerRequest"]
    request["oneOf"] = [{"required": ["question"]}, {"required": ["prompt"]}]
    found["AnswerForm"] = _form() | {"oneOf": request["oneOf"]}
    return found


def _form() -> dict[str, Any]:
    """The same fields in a form, where there is no null."""
    form = AnswerFields.model_json_schema() | {"title": "AnswerForm", "required": ["image"]}
    for values in form["properties"].values():
        if "anyOf" in values:
            values |= values.pop("anyOf")[0]
            del values["default"]
    described = "A picture file, or one as base64 or as a data URI."
    form["properties"]["image"] = {"description": described, "contentMediaType": "application/octet-stream"}
    return form
