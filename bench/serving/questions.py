"""Pictures and questions for the demo model, all different, and the requests that carry them."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SIDE = 64
"""Pixels; that of the demo model's own pictures."""
YS, XS = np.mgrid[:SIDE, :SIDE]
COLOURS = np.array([(255, 0, 0), (0, 128, 0), (0, 0, 255), (200, 200, 0), (128, 128, 128)], np.uint8)
SHAPES: tuple[Callable[..., NDArray[np.bool_]], ...] = (
    lambda dx, dy, r: dx**2 + dy**2 <= r**2,
    lambda dx, dy, r: (dx <= r) & (2 * np.abs(dy) <= r),
    lambda dx, dy, r: (np.abs(dy) <= r) & (2 * dx <= dy + r),
)
"""Circle, rectangle, triangle: pixels inside, by distance from the middle (across, without sign; down) and size."""
QUESTIONS = (
    "what color is the shape?",
    "what shape is present?",
    "is there a red shape?",
    "is there a circle?",
    "is there not a blue shape in the image?",
    "what is the color of the shape?",
)
PATH = "/v1/answer"


def picture(seed: int, number: int) -> bytes:
    """Return a PNG file of one shape on a soft background; other numbers give other pixels."""
    rng = np.random.default_rng([seed, number])
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pixels[:] = rng.integers(200, 256, 3)
    x, y, r = (int(v) for v in rng.integers((16, 16, 7), (48, 48, 15)))
    shape, colour = rng.integers((len(SHAPES), len(COLOURS)))
    pixels[SHAPES[shape](np.abs(XS - x), YS - y, r)] = COLOURS[colour]
    # the background alone has 175,000 colours: two pixels more make two equal pictures a matter of never
    pixels[0, [0, -1]] = rng.integers(0, 256, (2, 3))
    rows = np.zeros((SIDE, 1 + 3 * SIDE), np.uint8)  # each begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(SIDE, -1)
    return png(SIDE, SIDE, zlib.compress(rows.tobytes(), 1))


def png(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """Return a PNG file, right or not: `data` is its compressed rows, `extra` whole chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def png_chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def question(number: int) -> str:
    """Return the question about picture `number`."""
    return QUESTIONS[number % len(QUESTIONS)]


def json_body(file: bytes, text: str) -> bytes:
    """Return the JSON body of a question about a picture file."""
    return json.dumps({"image": base64.b64encode(file).decode(), "question": text}).encode()


def http_request(body: bytes, path: str = PATH, method: str = "POST", content_type: str = "application/json") -> bytes:
    """Return a whole HTTP/1.1 request on a connection that stays open."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def request(seed: int, number: int) -> bytes:
    """Return the HTTP request of picture and question `number`."""
    return http_request(json_body(picture(seed, number), question(number)))
