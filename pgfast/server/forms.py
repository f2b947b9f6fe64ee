"""Multipart forms (`curl -F image=@picture.jpg -F question=...`), from memory: their size is bounded already."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from .http_errors import ApiError

MAX_PARTS = 400


@dataclass(slots=True)
class Part:
    """One field of a form."""

    name: str = ""
    is_file: bool = False
    pieces: list[bytes] = field(default_factory=list)

    @property
    def content(self) -> bytes:
        """What it holds; a picture is usually one piece, and joining that copies nothing."""
        return b"".join(self.pieces)


def parse_form(content_type: bytes, body: bytes) -> list[Part]:
    """Take a form apart.

    Raises:
        ApiError: 400, if it is not one, or not whole.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise _broken("its boundary is not said in Content-Type")
    reader = _Reader()
    try:
        parser = python_multipart.MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _broken(str(error)) from None
    if not reader.whole:
        raise _broken("its end is missing")
    return reader.parts


class _Reader:
    """Collects what the parser reports."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.whole = False
        self._name, self._value = b"", b""

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise _broken(f"it has more than {MAX_PARTS} fields")
        self.parts.append(Part())

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self.parts[-1].name = options.get(b"name", b"").decode("utf-8", "replace")
            self.parts[-1].is_file = b"filename" in options
        self._name = self._value = b""

    def _headers_finished(self) -> None:
        if not self.parts[-1].name:
            raise _broken("a field has no name")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].pieces.append(data[start:end])

    def _end(self) -> None:
        self.whole = True


def _broken(why: str) -> ApiError:
    line = "".join(char if char.isprintable() else " " for char in why)[:200]
    return ApiError(400, "invalid_request", f"the multipart form cannot be read: {line}")
