"""Clients that go away: what they had asked for is given up, wherever it is."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from server_tools import ASK, BODY, HEAD, PICTURE, WAIT, Decoding, HeldEngine, answer, send, serving, until

import pgfast


@pytest.fixture
def held(demo: pgfast.Engine) -> Iterator[HeldEngine]:
    engine = HeldEngine(demo)
    yield engine
    engine.release()


def test_a_client_that_goes_away_frees_its_slot(held: HeldEngine) -> None:
    with serving(held) as server:
        sock = send(server)
        until(lambda: held.held)
        sock.close()
        until(lambda: held.cancelled == 1)
        sock = server.connect()
        sock.sendall(HEAD.replace(b"answer", b"answer?stream=1") + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        until(lambda: held.held)
        held.held[0].on_progress()
        found = b""
        while b'data: {"text":"bl"}' not in found:
            found += sock.recv(65536)
        sock.close()
        until(lambda: held.cancelled == 2)
        until(lambda: not server.service.admission.taken)
        assert server.metric("pgfast_requests_total", route="/v1/answer", status="499") == 1


def test_a_client_that_goes_away_after_a_large_body_is_noticed(held: HeldEngine) -> None:
    picture = base64.b64encode(PICTURE + b"\0" * 2**20).decode()
    with serving(held) as server:
        for number in range(5):  # whether reading pauses at the body's end depends on how it arrives
            sock = send(server, json.dumps({**ASK, "image": picture}).encode())
            until(lambda: held.held)
            sock.close()
            until(lambda number=number: held.cancelled == number + 1)
        until(lambda: not server.service.admission.taken)


def test_a_client_that_goes_away_while_its_picture_waits(demo: pgfast.Engine) -> None:
    engine = Decoding(demo)
    with serving(engine, decoders=1) as server:
        first, second = send(server), send(server)  # the same picture
        until(lambda: server.metric("pgfast_picture_cache_hits_total") == 1)
        first.close()
        until(lambda: server.service.admission.taken == 1)
        engine.go.set()
        assert answer(second.recv(65536))[2]["text"] == "blue"  # the other one has it all the same
        second.close()


def test_a_client_that_goes_away_while_its_long_text_is_taken_apart(held: HeldEngine) -> None:
    begun, go = threading.Event(), threading.Event()
    submit = held.submit

    def slowly(*args: Any, choices: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(WAIT)
        return submit(*args, choices=("yes", "no"), **options)

    held.submit = slowly  # type: ignore[method-assign]
    with serving(held) as server:
        choices = [f"{number} " + "a" * 100 for number in range(100)]
        sock = send(server, json.dumps({**ASK, "choices": choices}).encode())
        assert begun.wait(WAIT)
        sock.close()
        until(lambda: not server.service.admission.taken)
        go.set()
        until(lambda: held.cancelled == 1)


def test_with_the_engine_itself_nothing_is_left_running(demo: pgfast.Engine) -> None:
    with serving(demo) as server:
        for _ in range(10):
            socks = [send(server) for _ in range(30)]
            for sock in socks:
                sock.close()
        until(lambda: not server.service.admission.taken)
        until(lambda: demo.load_figures().running == demo.load_figures().waiting == 0)
        assert server.ask().json["text"] == "blue"
