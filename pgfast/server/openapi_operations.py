"""Every operation of the server, for the schema, with requests that can be sent as they are."""

from __future__ import annotations

from typing import Any

from .answer_api import STREAM
from .openapi_errors import references

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEX///8AAP94wDzzAAAAcklEQVR42tXQMQ7CQAxE0RcTiZ"
    "aSjj0KR+NoKTlGjpAyRbSmWCKxUgoqJKbx2N8jWea3uk1vk2urp6wIRkMzVyaCQiH2aHDn0tKZa4cGjP3ybqK1R+gbU1GPUWLr0YN22MTSo5kZnDPbZJOf3wiU"
    "p7/SC+gQGjbJ1y8lAAAAAElFTkSuQmCC"
)
"""A blue circle on white, 64 x 64."""
QUESTION = "what color is the shape?"
_LISTED = ("choices", "stop")


def paths(model: str, max_body: int, security: list[dict[str, Any]]) -> dict[str, Any]:
    """The operations by path.

    Args:
        model: The model's name.
        max_body: Bytes of a body that are accepted.
        security: What the API and the metrics ask for.
    """
    limited = f"Bodies have at most {max_body:,} bytes."
    found = {
        "/v1/answer": {"post": _answer(limited)},
        "/v1/chat/completions": {"post": _chat(model, limited)},
        "/v1/models": {"get": _get("listModels", "openai", "The model that runs here", "ModelList", 401)},
        "/v1/models/{id}": {"get": _model(model)},
        "/healthz": {"get": _text("isAlive", "Whether the process lives", "It does.")},
        "/readyz": {"get": _ready()},
        "/metrics": {"get": _metrics()},
        "/openapi.json": {"get": _document()},
    }
    for path, operations in found.items():
        for operation in operations.values():
            operation["security"] = security if path.startswith("/v1/") or path == "/metrics" else []
    return found


def _answer(limited: str) -> dict[str, Any]:
    base = {"image": PICTURE, "question": QUESTION}
    bodies = {
        "question": {"summary": "A question", "value": base},
        "choices": {"summary": "Which of these answers is it?", "value": base | {"choices": ["red", "blue"]}},
        "prompt": {"summary": "A raw prompt", "value": {"image": PICTURE, "prompt": f"answer en {QUESTION}"}},
        "sampled": {"summary": "Drawn, not the most probable", "value": base | {"temperature": 0.7, "top_p": 0.9, "seed": 1}},
    }
    forms = {"form": {"summary": "In a form; the picture may be a file", "value": base | {"choices": ["red", "blue"]}}}
    stream = {
        "name": "stream",
        "in": "query",
        "description": "Send server-sent events while the answer is made.",
        "schema": {"enum": list(STREAM), "default": "0"},
    }
    described = "Give `question`, around which the bundle's template goes, or `prompt`, which is sent as it is."
    events = (
        'With `stream=1`: an event `piece` with `{"text": ...}` for each piece of the text as the model makes it, then an '
        "event `answer` with an AnswerBody, or an event `error` with an ErrorBody."
    )
    return {
        "operationId": "answer",
        "tags": ["answer"],
        "summary": "Ask a question about a picture",
        "description": f"{described} {limited}",
        "parameters": [stream],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("AnswerRequest"), "examples": bodies},
                "multipart/form-data": {
                    "schema": _ref("AnswerForm"),
                    "examples": forms,
                    "encoding": {name: {"style": "form", "explode": True} for name in _LISTED},
                },
            },
        },
        "responses": {
            "200": {
                "description": f"The answer. {events}",
                "content": {
                    "application/json": {"schema": _ref("AnswerBody")},
                    "text/event-stream": {
                        "schema": {"anyOf": [_event("piece"), _event("answer", "AnswerBody"), _event("error", "ErrorBody")]}
                    },
                },
            },
            **references(401, 403, 413, 415, 429, 504),
        },
    }


def _chat(model: str, limited: str) -> dict[str, Any]:
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    base = {"model": model, "messages": [{"role": "user", "content": content}]}
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    bodies = {
        "question": {"summary": "A question", "value": base},
        "logprobs": {"summary": "With the tokens and their log-probabilities", "value": base | {"logprobs": True}},
        "stream": {"summary": "Piece by piece", "value": base | streaming},
        "choices": {"summary": "Which of these answers is it?", "value": base | {"choices": ["red", "blue"]}},
    }
    described = (
        "For OpenAI's clients. The model answers one question about one picture: one user message with a text part and an "
        "image_url part. Keys of the official API that cannot be honoured are accepted with the value that changes nothing, "
        "and refused with any other. Without `temperature` the most probable token is taken each time (officially it is 1). "
        f"`choices`, `language`, `top_k` and `raw_prompt` are additions: `extra_body` of the Python client. {limited}"
    )
    events = (
        "With `stream`: each event is a ChatCompletionChunk, the last one is `[DONE]`; what goes wrong on the way is an event "
        "with an ErrorBody."
    )
    done = {"type": "object", "required": ["data"], "properties": {"data": {"const": "[DONE]"}}}
    return {
        "operationId": "createChatCompletion",
        "tags": ["openai"],
        "summary": "Ask a question about a picture, in OpenAI's form",
        "description": described,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("ChatRequest"), "examples": bodies}},
        },
        "responses": {
            "200": {
                "description": f"The answer. {events}",
                "content": {
                    "application/json": {"schema": _ref("ChatCompletion")},
                    "text/event-stream": {"schema": {"anyOf": [_event("message", "ChatCompletionChunk"), done]}},
                },
            },
            **references(401, 403, 404, 413, 415, 429, 504),
        },
    }


def _event(name: str, schema: str | None = None) -> dict[str, Any]:
    """One event of a stream, as OpenAPI 3.2 describes them; 3.1 says nothing about streams."""
    data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json"}
    if schema is not None:
        data["contentSchema"] = _ref(schema)
    properties = {"event": {"const": name}, "data": data}
    return {"type": "object", "required": ["data"], "properties": properties}


def _get(name: str, tag: str, summary: str, schema: str, *errors: int) -> dict[str, Any]:
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        "responses": {
            "200": {"description": f"{summary}.", "content": {"application/json": {"schema": _ref(schema)}}},
            **references(*errors),
        },
    }


def _model(model: str) -> dict[str, Any]:
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}, "example": model}
    return _get("retrieveModel", "openai", "A model by its name", "ModelCard", 401, 404) | {"parameters": [name]}


def _document() -> dict[str, Any]:
    operation = _get("describe", "operation", "This description", "ErrorBody")
    operation["responses"]["200"]["content"]["application/json"]["schema"] = {
        "type": "object",
        "required": ["openapi", "paths"],
    }
    return operation


def _text(name: str, summary: str, described: str) -> dict[str, Any]:
    text = {"schema": {"type": "string"}}
    return {
        "operationId": name,
        "tags": ["operation"],
        "summary": summary,
        "responses": {"200": {"description": described, "content": {"text/plain": text}}, **references()},
    }


def _ready() -> dict[str, Any]:
    operation = _text("isReady", "Whether the server wants requests", "It does.")
    operation["responses"]["503"] = {
        "description": "It is starting or stopping (or too many connections are open).",
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            "application/json": {"schema": _ref("ErrorBody")},
        },
    }
    return operation


def _metrics() -> dict[str, Any]:
    operation = _text("readMetrics", "What the server has done, for Prometheus", "Prometheus' text format.")
    operation["responses"] |= references(401)
    return operation


def _ref(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}
