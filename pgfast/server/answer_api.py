"""POST /v1/answer."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from pgfast.types import EncodedImage, GenerateOptions

from .bodies import decode_picture, invalid, off_loop, parse_json, read_body
from .config import ServerConfig
from .forms import parse_form
from .http_errors import ApiError
from .service import AnswerService, Ask, Served
from .streams import EventStream

LISTS = frozenset(("choices", "stop"))
STREAM = {"0": False, "1": True, "false": False, "true": True}
"""Values of the query's `stream`."""


NOT_BLANK = Field(json_schema_extra={"pattern": r"\S"})
"""For the schema: the engine refuses it in clearer words."""


class RemotePicture(BaseModel):
    """A picture that the server fetches, from the hosts that it was allowed to."""

    model_config = ConfigDict(extra="forbid", strict=True)
    url: str


class AnswerFields(BaseModel):
    """What can be asked about a picture."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    question: Annotated[str, NOT_BLANK] | None = Field(
        default=None, description="Plain text; the bundle's template goes around it."
    )
    prompt: Annotated[str, NOT_BLANK] | None = Field(
        default=None, description="A raw prompt instead, for example `caption en`."
    )
    choices: list[Annotated[str, NOT_BLANK]] | None = Field(
        default=None,
        max_length=256,
        description="Score exactly these answers and return the most probable one.",
        json_schema_extra={"minItems": 1, "uniqueItems": True},
    )
    language: str = Field(default="en", max_length=64, description="Code that the bundle's template names.")
    # ranges are checked by the engine, which knows the bundle's limits
    max_new_tokens: int | None = Field(
        default=None, description="Upper bound on generated tokens; null: the bundle's own.", json_schema_extra={"minimum": 1}
    )
    temperature: float = Field(
        default=0.0, description="0 takes the most probable token each time.", json_schema_extra={"minimum": 0}
    )
    top_p: float = Field(
        default=1.0,
        description="Draw only from the most probable tokens that together hold this much probability.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )
    top_k: int = Field(
        default=0,
        description="Draw only from this many most probable tokens; 0: from all.",
        json_schema_extra={"minimum": 0, "maximum": 2**31},
    )
    seed: int | None = Field(
        default=None,
        description="The same seed gives the same text; null: a new draw each time.",
        json_schema_extra={"minimum": 0, "maximum": 2**63},
    )
    stop: list[Annotated[str, Field(json_schema_extra={"minLength": 1})]] = Field(
        default=[], max_length=16, description="Texts that end the answer; they are cut off."
    )

    min_confidence: float | None = Field(
        default=None,
        description='An answer that is less certain becomes "unsure"; null: none does. Not for streams.',
        json_schema_extra={"minimum": 0, "maximum": 1},
    )

    def ask(self, picture: bytes | EncodedImage) -> Ask:
        """The question to the service."""
        if (self.question is None) == (self.prompt is None):
            raise ApiError(400, "invalid_request", "give a question, or a prompt, and not both")
        options = GenerateOptions(
            self.max_new_tokens,
            self.temperature,
            self.top_p,
            self.top_k,
            self.seed,
            tuple(self.stop),
            min_confidence=self.min_confidence,
        )
        choices = tuple(self.choices) if self.choices is not None else None
        return Ask(picture, self.question, self.prompt, choices, self.language, options)


class AnswerRequest(AnswerFields):
    """The body of POST /v1/answer."""

    image: str | RemotePicture = Field(
        description="The picture file as base64 or as a data URI (`data:image/png;base64,...`), or where to fetch it."
    )


def routes(service: AnswerService, config: ServerConfig) -> list[BaseRoute]:
    """The routes of this file."""

    async def answer(request: Request) -> Any:
        stream = _wants_stream(request)
        ask = await _read(request, service, config)
        if stream:
            return EventStream(_events(service, ask))
        return Response(answer_json(service, await service.answer(ask)), media_type="application/json")

    return [Route("/v1/answer", answer, methods=["POST"])]


def _wants_stream(request: Request) -> bool:
    wanted = request.query_params.get("stream", "0") if request.scope["query_string"] else "0"
    if wanted not in STREAM:
        raise ApiError(400, "invalid_request", f"stream is one of {', '.join(STREAM)}", param="stream")
    return STREAM[wanted]


async def _read(request: Request, service: AnswerService, config: ServerConfig) -> Ask:
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise ApiError(415, "unsupported_media_type", "send application/json or multipart/form-data")
    body = await read_body(request, config.max_body)
    if kind == "application/json":
        fields, picture = await off_loop(len(body), _read_json, body)
    else:
        fields, picture = await off_loop(len(body), _read_form, content_type.encode("latin-1"), body)
    return fields.ask(picture if isinstance(picture, bytes) else await service.fetch_picture(picture.url))


def _read_json(body: bytes) -> tuple[AnswerFields, bytes | RemotePicture]:
    asked = parse_json(AnswerRequest, body)
    return asked, decode_picture(asked.image) if isinstance(asked.image, str) else asked.image


def _read_form(content_type: bytes, body: bytes) -> tuple[AnswerFields, bytes]:
    picture, values = None, dict[str, Any]()
    for part in parse_form(content_type, body):
        name, content = part.name, part.content
        if name == "image" and picture is None:
            is_text = not part.is_file or content.startswith(b"data:")
            picture = decode_picture(content.decode("latin-1")) if is_text else content
        elif name in LISTS:
            values.setdefault(name, []).append(_text(name, content))
        elif name == "image" or name in values:
            raise ApiError(400, "invalid_request", f"{name}: it is there twice", param=name)
        else:
            values[name] = _text(name, content)
    if picture is None:
        raise ApiError(400, "invalid_request", "image: Field required", param="image")
    try:
        return AnswerFields.model_validate(values, strict=False), picture
    except ValidationError as error:
        raise invalid(error) from None


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ApiError(400, "invalid_request", "a field of the form is not UTF-8", param=None) from None


def answer_json(service: AnswerService, answer: Served) -> bytes:
    """The response's body."""
    times = answer.timings
    found = {
        "id": f"answer-{random.getrandbits(96):024x}",
        "model": service.model,
        "text": answer.text,
        "confidence": answer.confidence,
        "calibrated": answer.calibrated,
        "unsure_of": answer.unsure_of,
        "token_logprobs": answer.token_logprobs,
        "finish_reason": answer.finish_reason,
        "choices": answer.choices,
        "image": {"width": answer.width, "height": answer.height},
        "timings": {
            "preprocess": times.preprocess,
            "vision": times.vision,
            "prefill": times.prefill,
            "decode": times.decode,
            "queue": answer.queue,
            "ttft": times.ttft,
            "total": times.total,
        },
    }
    return to_json(found, inf_nan_mode="null")


async def _events(service: AnswerService, ask: Ask) -> AsyncGenerator[bytes]:
    async with aclosing(service.stream(ask)) as pieces:
        async for piece in pieces:
            if isinstance(piece, str):
                yield b"event: piece\ndata: %b\n\n" % to_json({"text": piece})
            else:
                yield b"event: answer\ndata: %b\n\n" % answer_json(service, piece)
