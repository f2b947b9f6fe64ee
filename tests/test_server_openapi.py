"""The OpenAPI description: it is valid, it names what there is, and its examples work."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR
from server_tools import serving
from starlette.applications import Starlette
from starlette.routing import Route

from pgfast import Engine
from pgfast.server import __file__ as server_file
from pgfast.server.app import build_app
from pgfast.server.config import ServerConfig
from pgfast.server.openapi import document
from pgfast.server.openapi_errors import ERRORS

DOCUMENT = document("demo_checkpoint", ServerConfig())
OPERATIONS = [
    (path, method, operation) for path, operations in DOCUMENT["paths"].items() for method, operation in operations.items()
]
EXAMPLES = [
    (path, media_type, name)
    for path, _, operation in OPERATIONS
    for media_type, content in operation.get("requestBody", {"content": {}})["content"].items()
    for name in content["examples"]
]


@pytest.fixture(scope="module")
def address(demo: Engine) -> Iterator[str]:
    with serving(demo) as running:
        yield running.url


def check(value: Any, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema | {"components": DOCUMENT["components"]}).validate(value)


def responses_of(operation: dict[str, Any], status: int) -> dict[str, Any]:
    found: dict[str, Any] = operation["responses"][str(status)]
    return DOCUMENT["components"]["responses"][found["$ref"].rpartition("/")[2]] if "$ref" in found else found


def check_response(operation: dict[str, Any], response: httpx2.Response) -> None:
    media_type = response.headers["content-type"].partition(";")[0]
    schema = responses_of(operation, response.status_code)["content"][media_type]["schema"]
    if media_type == "text/event-stream":
        for event in events_of(response.text):
            check(event, schema)
    else:
        check(response.json() if media_type == "application/json" else response.text, schema)


def events_of(text: str) -> list[dict[str, str]]:
    parts = [[line.split(": ", 1) for line in event.split("\n")] for event in text.split("\n\n") if event]
    return [{"event": "message"} | dict(lines) for lines in parts]


def test_it_is_valid_openapi() -> None:
    assert [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(DOCUMENT)] == []
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(DOCUMENT)
    for name in DOCUMENT["components"]["schemas"]:
        assert name in text
    for part in text.split('"$ref": "#/')[1:]:  # every reference leads somewhere
        found: Any = DOCUMENT
        for key in part.partition('"')[0].split("/"):
            found = found[key]


def test_it_names_every_route_and_no_other(demo: Engine) -> None:
    app: Starlette = build_app(demo, ServerConfig())
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.include_in_schema
        for method in route.methods or ()
        if method != "HEAD"
    }
    app.state.service.close()
    assert routes == {(path, method) for path, method, _ in OPERATIONS}
    assert len({operation["operationId"] for _, _, operation in OPERATIONS}) == len(OPERATIONS)


def test_it_knows_every_error() -> None:
    raised: dict[int, set[str]] = {}
    for path in Path(server_file).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError":
                status, code = node.args[:2]
                if isinstance(status, ast.Constant) and isinstance(code, ast.Constant):
                    raised.setdefault(status.value, set()).add(code.value)
    assert {413, 429, 503} <= set(raised)
    assert all(codes <= set(ERRORS[status]) for status, codes in raised.items())


def test_the_server_serves_it(address: str) -> None:
    response = httpx2.get(f"{address}/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == DOCUMENT


def test_it_says_whether_keys_are_needed() -> None:
    locked = document("demo_checkpoint", ServerConfig(api_keys=("key",)))
    for paths, needed in ((DOCUMENT["paths"], [{}, {"bearer": []}]), (locked["paths"], [{"bearer": []}])):
        assert paths["/v1/answer"]["post"]["security"] == paths["/metrics"]["get"]["security"] == needed
        assert paths["/healthz"]["get"]["security"] == paths["/openapi.json"]["get"]["security"] == []


@pytest.mark.parametrize(("path", "media_type", "name"), EXAMPLES)
def test_every_example_is_answered(address: str, path: str, media_type: str, name: str) -> None:
    operation = DOCUMENT["paths"][path]["post"]
    content = operation["requestBody"]["content"][media_type]
    value = content["examples"][name]["value"]
    check(value, content["schema"])
    if media_type == "application/json":
        response = httpx2.post(address + path, json=value, timeout=30)
    else:
        form = [(key, each) for key, values in value.items() for each in (values if isinstance(values, list) else [values])]
        # the picture as a file, which it is for most clients
        fields: Any = [(key, ("picture.png" if key == "image" else None, each)) for key, each in form]
        response = httpx2.post(address + path, files=fields, timeout=30)
    assert response.status_code == 200, response.text
    check_response(operation, response)
    if value.get("stream"):
        check_chunks(response.text)
    elif name != "sampled":
        assert '"blue"' in response.text


def check_chunks(text: str) -> None:
    *chunks, end = events_of(text)
    assert end["data"] == "[DONE]"
    for chunk in chunks:
        check(json.loads(chunk["data"]), {"$ref": "#/components/schemas/ChatCompletionChunk"})


@pytest.mark.parametrize(
    ("path", "operation"), [(path, operation) for path, method, operation in OPERATIONS if method == "get"]
)
def test_everything_that_can_be_read_is_as_described(address: str, path: str, operation: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", ()):
        path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
    response = httpx2.get(address + path)
    assert response.status_code == 200
    check_response(operation, response)


def test_the_streamed_form_of_an_answer_is_as_described(address: str) -> None:
    operation = DOCUMENT["paths"]["/v1/answer"]["post"]
    value = operation["requestBody"]["content"]["application/json"]["examples"]["question"]["value"]
    response = httpx2.post(f"{address}/v1/answer", params={"stream": "1"}, json=value, timeout=30)
    check_response(operation, response)
    piece, answer = events_of(response.text)
    assert (piece["event"], answer["event"]) == ("piece", "answer")
    check(json.loads(answer["data"]), {"$ref": "#/components/schemas/AnswerBody"})


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/v1/answer", {}, {"image": "!", "question": "what?"}, 400),
        ("/v1/answer", {}, {"question": "what?"}, 400),
        ("/v1/answer?stream=yes", {}, {"image": "", "question": "what?"}, 400),
        ("/v1/answer", {"content-type": "text/plain"}, {}, 415),
        ("/v1/answer", {"origin": "https://example.com"}, {}, 403),
        ("/v1/answer", {}, {"image": "a" * (21 << 20)}, 413),
        ("/v1/chat/completions", {}, {"model": "demo_checkpoint", "messages": []}, 400),
        ("/v1/chat/completions", {"content-type": "text/plain"}, {}, 415),
    ],
)
def test_errors_are_as_described(address: str, path: str, headers: dict[str, str], body: Any, status: int) -> None:
    content = json.dumps(body)
    response = httpx2.post(address + path, content=content, headers={"content-type": "application/json"} | headers)
    assert response.status_code == status
    check_response(DOCUMENT["paths"][path.partition("?")[0]]["post"], response)


@pytest.mark.parametrize("status", sorted(ERRORS))
def test_examples_of_errors_fit_their_schema(status: int) -> None:
    (found,) = (
        response
        for response in DOCUMENT["components"]["responses"].values()
        if set(response["content"]["application/json"]["examples"]) == set(ERRORS[status])
    )
    content = found["content"]["application/json"]
    for example in content["examples"].values():
        check(example["value"], content["schema"])
