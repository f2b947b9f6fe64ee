"""What the OpenAI-compatible endpoints answer: the keys of the official API that this server has, and a few of its own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12


class _Told(BaseModel):
    # what is always sent is required in the schema, whatever its default here
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class TokenLogprob(_Told):
    """A token of the answer."""

    token: str = Field(description="The characters that it completes; all of them add up to the answer.")
    bytes: list[int] = Field(description="Its own bytes of UTF-8; all of them add up to the answer too.")
    logprob: float = Field(description="Natural log-probability before temperature, top_p and top_k.")
    top_logprobs: list[Any] = Field(default_factory=list, max_length=0)


class Logprobs(_Told):
    """The tokens of an answer, or of a part of it."""

    content: list[TokenLogprob]
    refusal: None = None


class Message(_Told):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Told):
    """The only answer, `index` 0."""

    index: Literal[0] = 0
    message: Message
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]
    confidence: float = Field(description="Probability of exactly this answer; an addition to the official API.")
    calibrated: float | None = Field(
        default=None, description="Chance that the answer is right, by the bundle's calibration; null: it has none."
    )
    choices: dict[str, float] | None = Field(
        default=None,
        description="With `choices` in the request: the probability of each, given that one of them is the answer.",
    )


class PromptTokensDetails(_Told):
    """Parts of the prompt."""

    image_tokens: int
    text_tokens: int


class Usage(_Told):
    """Numbers of tokens."""

    prompt_tokens: int = Field(description="Picture and text, with the template and the model's own markers.")
    completion_tokens: int = Field(description="Generated tokens, the one that ends the answer included.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatCompletion(_Told):
    """An answer in OpenAI's form."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Names the bundle: with the same one, a seed gives the same text.")
    choices: list[Choice] = Field(min_length=1, max_length=1)
    usage: Usage


class Delta(TypedDict, total=False):
    """What is new in a chunk; nothing in the last one."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(BaseModel):  # not _Told: its deltas' keys would be required too
    """A part of the only answer."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    confidence: float | None = Field(default=None, description="In the last chunk with a choice.")
    calibrated: float | None = Field(default=None, description="In the last chunk with a choice.")
    choices: dict[str, float] | None = Field(default=None, description="In the last chunk with a choice.")


class ChatCompletionChunk(_Told):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice] = Field(max_length=1)
    usage: Usage | None = None


class ModelCard(_Told):
    """A model that answers here."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server loaded it, in seconds since 1970.")
    owned_by: str


class ModelList(_Told):
    """All models that answer here: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
