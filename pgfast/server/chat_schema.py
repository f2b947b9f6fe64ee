"""What a request to the OpenAI-compatible endpoint looks like.

The models are strict, so a misspelt key is an error and not a setting without effect. Keys of the official API that this model
cannot honour are known by name: they are accepted with the value that changes nothing and refused with any other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_plain_validator_function

from pgfast.types import GenerateOptions

MOST_STOPS = 16
"""The official API takes 4."""
MOST_CHOICES = 256
"""Each choice costs at least one run of the decoder."""


_NOT_BLANK = Field(json_schema_extra={"pattern": r"\S"})
"""For the schema: the engine refuses it in clearer words."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _refusal(reason: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{reason}", {"reason": reason})


class _Neutral:
    """Marks a key that may only have values which change nothing."""

    def __init__(self, reason: str, *values: Any) -> None:
        self._reason, self._values = reason, (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._values), "description": f"Not supported: {self._reason}."}

    def _check(self, value: Any) -> Any:
        # 1 == True in Python
        if any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in self._values):
            return value
        raise _refusal(self._reason)


_Stop = Annotated[str, Field(json_schema_extra={"minLength": 1})]
_Ignored = Annotated[Any, WithJsonSchema({"description": "Accepted and ignored."})]


class ImageUrl(_Strict):
    """Where the picture is."""

    url: str = Field(
        description="A data URI (`data:image/png;base64,...`), or a URL on a host that the server allows (none by default)."
    )
    detail: Literal["auto", "low", "high", "original"] = Field(
        default="auto", description="Ignored: the model has one resolution."
    )


class ImagePart(_Strict):
    """The picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Strict):
    """The question."""

    type: Literal["text"]
    text: Annotated[str, _NOT_BLANK]


def _check_parts(parts: list[Any]) -> list[Any]:
    pictures = sum(isinstance(part, ImagePart) for part in parts)
    if pictures != 1:
        found = "there is none" if pictures == 0 else f"there are {pictures}"
        raise _refusal(f"this model answers one question about one picture: one image_url part is needed, {found}")
    if len(parts) != 2:
        found = "there is none" if len(parts) == 1 else f"there are {len(parts) - 1}"
        raise _refusal(f"this model answers one question about one picture: one text part is needed, {found}")
    return parts


def _check_content(content: Any) -> Any:
    if isinstance(content, str):
        raise _refusal("this model answers questions about a picture: content is a list with a text part and an image_url part")
    return content


class UserMessage(_Strict):
    """One question about one picture."""

    role: Literal["user"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        AfterValidator(_check_parts),
        BeforeValidator(_check_content),
    ] = Field(json_schema_extra={"minItems": 2, "maxItems": 2})
    name: str | None = Field(default=None, description="Ignored.")


def _check_messages(messages: Any) -> Any:
    """Say what is wrong with a conversation before its parts are looked at one by one."""
    if not isinstance(messages, list):
        return messages
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    if "system" in roles or "developer" in roles:
        raise _refusal("this model takes no instructions: leave out system messages and ask in one user message")
    if len(messages) != 1 or any(isinstance(role, str) and role != "user" for role in roles):
        raise _refusal("this model answers one question about one picture: send one user message, without a history")
    return messages


def _check_stop(stop: Any) -> Any:
    if isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise _refusal(f"at most {MOST_STOPS} stop texts are accepted")
    return stop


class StreamOptions(_Strict):
    """What a stream holds besides the answer."""

    include_usage: bool | None = Field(default=None, description="End with a chunk that has `usage` and no choices.")
    include_obfuscation: bool | None = Field(default=None, description="Ignored: nothing is padded.")


_NO_TOOLS = "this model cannot call tools"
_NO_PENALTY = "this model has no penalties on tokens"


class ChatRequest(_Strict):
    """A question about a picture, in OpenAI's form."""

    model: str = Field(description="The id that `/v1/models` lists.")
    messages: Annotated[list[UserMessage], BeforeValidator(_check_messages)] = Field(
        json_schema_extra={"minItems": 1, "maxItems": 1}
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="Upper bound on generated tokens; the model's own limit holds where this is larger."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="The older name of `max_completion_tokens`.")
    temperature: float | None = Field(
        default=None, ge=0, description="0 takes the most probable token each time, and is what holds without this key."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Draw only from tokens that together hold this probability."
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="The same seed gives the same text.")
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Field(json_schema_extra={"maxItems": MOST_STOPS})] | None, AfterValidator(_check_stop)
    ] = Field(default=None, description=f"One text, or up to {MOST_STOPS}, that end the answer; they are cut off.")
    stream: bool | None = Field(default=None, description="Send server-sent events while the answer is made.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    logprobs: bool | None = Field(default=None, description="Return each token with its log-probability.")

    # beyond the official API: `extra_body` of its client
    choices: list[Annotated[str, _NOT_BLANK]] | None = Field(
        default=None,
        min_length=1,
        max_length=MOST_CHOICES,
        description="Score exactly these answers and return the most probable one.",
        json_schema_extra={"uniqueItems": True},
    )
    language: str = Field(default="en", max_length=64, description="Code that the bundle's template names.")
    top_k: int | None = Field(
        default=None, ge=0, lt=2**31, description="Draw only from this many most probable tokens; 0: from all."
    )
    raw_prompt: bool = Field(default=False, description="Send the text to the model as it is, without the bundle's template.")

    # of the official API, where only the value that changes nothing is right
    n: Annotated[Any, _Neutral("this model gives one answer, n is 1", 1)] = None
    top_logprobs: Annotated[Any, _Neutral("only the chosen tokens have log-probabilities, top_logprobs is 0", 0)] = None
    presence_penalty: Annotated[Any, _Neutral(_NO_PENALTY, 0)] = None
    frequency_penalty: Annotated[Any, _Neutral(_NO_PENALTY, 0)] = None
    logit_bias: Annotated[Any, _Neutral("this model takes no biases", {})] = None
    response_format: Annotated[Any, _Neutral("this model answers in plain text; `choices` restricts it", {"type": "text"})] = (
        None
    )
    modalities: Annotated[Any, _Neutral("this model answers in text", ["text"])] = None
    audio: Annotated[Any, _Neutral("this model answers in text")] = None
    tools: Annotated[Any, _Neutral(_NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, _Neutral(_NO_TOOLS, "none", "auto")] = None
    functions: Annotated[Any, _Neutral(_NO_TOOLS, [])] = None
    function_call: Annotated[Any, _Neutral(_NO_TOOLS, "none", "auto")] = None
    web_search_options: Annotated[Any, _Neutral("this server searches nothing")] = None
    moderation: Annotated[Any, _Neutral("this server has no moderation")] = None
    reasoning_effort: Annotated[Any, _Neutral("this model does not reason, reasoning_effort is none", "none")] = None
    verbosity: Annotated[Any, _Neutral("this model's answers have one length", "medium")] = None

    # of the official API, about its own bookkeeping and speed
    user: _Ignored = None
    metadata: _Ignored = None
    store: _Ignored = None
    service_tier: _Ignored = None
    safety_identifier: _Ignored = None
    prediction: _Ignored = None
    parallel_tool_calls: _Ignored = None
    prompt_cache_key: _Ignored = None
    prompt_cache_options: _Ignored = None
    prompt_cache_retention: _Ignored = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _refusal("max_tokens and max_completion_tokens are two names of one limit: give one of them")
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options needs stream: true")
        return self

    @property
    def text(self) -> str:
        """The question, or with `raw_prompt` the whole prompt."""
        (text,) = (part.text for part in self.messages[0].content if isinstance(part, TextPart))
        return text

    @property
    def picture_url(self) -> str:
        """Data URI or address of the picture."""
        (url,) = (part.image_url.url for part in self.messages[0].content if isinstance(part, ImagePart))
        return url

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def options(self, most: int) -> GenerateOptions:
        """Return how to decode; `most` is the model's own limit of new tokens."""
        limit = self.max_completion_tokens or self.max_tokens
        return GenerateOptions(
            max_new_tokens=min(limit, most) if limit else None,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        )
