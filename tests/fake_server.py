"""A small HTTP server that answers like `pgfast serve`, with faults that `bench serve` must notice.

    python fake_server.py FAULT --port N

none; bad: wrong answers and errors of 500, memory and threads that are never let go, tracebacks; rude: refuses late and without
Retry-After, and lets no memory go; dies: ends on a strange body; stuck: never answers one.

The text it answers is a pure function of the question's body, in `answer_of`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import threading
import time
from typing import Any

FAULTS = ("none", "bad", "rude", "dies", "stuck")
SLOTS = 8
SECONDS = 0.02
"""Of one answer; so many answers a second at most: SLOTS / SECONDS."""
SCHEMA = {
    "openapi": "3.1.0",
    "info": {"title": "fake", "version": "1"},
    "paths": {
        "/v1/answer": {
            "post": {
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {
                            "schema": {
                                "type": "object",
                                "properties": {"image": {"type": "string"}, "question": {"type": "string"}},
                                "required": ["image", "question"],
                                "additionalProperties": False,
                            }
                        }
                    },
                },
                "responses": {"200": {"description": "an answer"}, "default": {"description": "an error"}},
            }
        }
    },
}
KEPT: list[bytes] = []
fault, running = "none", 0


def answer_of(image: str, question: str) -> str:
    """Some text."""
    return hashlib.sha256(f"{image}{question}".encode()).hexdigest()[:8]


async def answer(body: bytes) -> tuple[int, Any, str]:
    global running
    try:
        asked = json.loads(body)
        image, question = str(asked["image"]), str(asked["question"])
    except (ValueError, KeyError, TypeError, RecursionError):
        if fault == "bad":
            print("Traceback (most recent call last):", file=sys.stderr, flush=True)
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
            KEPT.append(bytes([1]) * 1_000_000)
            return 500, {"error": "oh"}, ""
        if fault == "stuck":
            await asyncio.sleep(1000)
        return 400, {"error": {"message": "no"}}, ""
    if running >= 40:
        if fault == "rude":
            await asyncio.sleep(0.4)
        return 429, {"error": {"message": "later"}}, "" if fault == "rude" else "Retry-After: 1\r\n"
    running += 1
    try:
        if fault == "rude":
            KEPT.append(bytes([1]) * 200_000)
        async with slots:
            await asyncio.sleep(SECONDS)
    finally:
        running -= 1
    if fault == "bad" and len(question) % 2:
        return 500, {"error": "oh"}, ""
    return 200, {"text": "wrong" if fault == "bad" else answer_of(image, question)}, ""


async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, path, *_ = head.split(" ", 2)
            length = head.lower().partition("\r\ncontent-length:")[2].partition("\r\n")[0].strip() or "0"
            if not length.isdigit() or len(length) > 7:
                break
            body = await reader.readexactly(int(length))
            if fault == "dies" and body and not body.startswith(b"{"):
                os._exit(3)
            if path.startswith("/v1/answer") and method == "POST":
                status, content, more = await answer(body)
            elif path == "/openapi.json":
                status, content, more = 200, SCHEMA, ""
            else:
                status, content, more = (200 if path in ("/healthz", "/readyz") else 404), {}, ""
            data = json.dumps(content).encode()
            said = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}Content-Length: {len(data)}\r\n\r\n"
            writer.write(said.encode() + data)
            await writer.drain()
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass
    finally:
        writer.close()


async def main() -> None:
    global fault, slots
    fault = sys.argv[1]
    assert fault in FAULTS
    slots = asyncio.Semaphore(SLOTS)
    server = await asyncio.start_server(client, "127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]), backlog=1000)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
