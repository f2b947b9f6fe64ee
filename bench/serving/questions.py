"""Pictures and questions for the demo model, all different, and the requests that carry them."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
"""Pixels; that of the demo model's own pictures."""
COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (200, 200, 0), "grey": (128, 128, 128)}
SHAPES = ("circle", "rectangle", "triangle")
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
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(200, 256, 3)))
    draw, colour = ImageDraw.Draw(image), COLOURS[str(rng.choice(list(COLOURS)))]
    x, y, r = (int(v) for v in rng.integers((16, 16, 7), (48, 48, 15)))
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "rectangle":
        draw.rectangle((x - r, y - r // 2, x + r, y + r // 2), fill=colour)
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    # the background alone has 175,000 colours: two pixels more make two equal pictures a matter of never
    for corner in ((0, 0), (SIDE - 1, 0)):
        image.putpixel(corner, tuple(int(v) for v in rng.integers(0, 256, 3)))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


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
