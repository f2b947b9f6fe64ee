"""Shapes of responses that are written without pydantic, because that is faster; for the schema only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from .openapi_errors import ERRORS

CODES = sorted(code for codes in ERRORS.values() for code in codes)


class PictureSize(BaseModel):
    """Pixels of the picture as it was given."""

    width: int
    height: int


class AnswerTimings(BaseModel):
    """Seconds. Other questions share the decoder: prefill and decode are what passed on the clock meanwhile."""

    preprocess: float = Field(description="Decoding and resizing the picture, tokenizing.")
    vision: float = Field(description="Vision encoder; 0 when the picture was known.")
    prefill: float = Field(description="The prompt's pass, up to the first token.")
    decode: float = Field(description="All later tokens.")
    ttft: float = Field(description="From the request to the first token.")
    total: float = Field(description="From the request to the last token.")
    queue: float = Field(description="The part of the total in which the question waited for others.")


class AnswerBody(BaseModel):
    """The answer to POST /v1/answer."""

    id: str
    model: str
    text: str
    confidence: float = Field(
        description="Probability of exactly this answer: the product of its tokens' probabilities.", ge=0, le=1
    )
    calibrated: float | None = Field(
        description="Chance that the answer is right, by the bundle's calibration; null: it has none."
    )
    unsure_of: str | None = Field(
        description="The answer that min_confidence made `unsure`; confidence, tokens and choices are about this one."
    )
    token_logprobs: list[float] = Field(
        description="Natural log-probability of each token, before temperature, top_p and top_k."
    )
    finish_reason: Literal["stop", "length"] = Field(description="length: max_new_tokens was reached.")
    choices: dict[str, float] | None = Field(
        description="Probability of each choice, given that one of them is the answer; null if none were given."
    )
    image: PictureSize
    timings: AnswerTimings


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="One line for people.")
    type: Literal["invalid_request_error", "server_error"]
    code: Annotated[str, WithJsonSchema({"enum": CODES})] = Field(description="Stable word for programs.")
    param: str | None = Field(description="Which field of the request is meant.")


class ErrorBody(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail
