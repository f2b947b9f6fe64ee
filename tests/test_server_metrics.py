"""What the server counts, and the pictures that it keeps."""

from __future__ import annotations

import asyncio
import base64
import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_tools import PICTURE, WAIT, HeldEngine, serving, until

import pgfast
from pgfast.errors import ImageError
from pgfast.server.metrics import Metrics
from pgfast.server.picture_cache import OVERHEAD, Encoded, PictureCache
from pgfast.types import EncodedImage


def test_requests_are_counted_by_route_and_status(demo: pgfast.Engine) -> None:
    with serving(demo) as server:
        server.ask()
        server.ask()
        server.ask(question="")
        server.request("GET", "/v1/answer")
        for number in range(3):  # strangers cannot make up labels
            server.request("GET", f"/made-up-{number}")
        for labels, count in (
            ({"route": "/v1/answer", "status": "200"}, 2),
            ({"route": "/v1/answer", "status": "400"}, 1),
            ({"route": "/v1/answer", "status": "405"}, 1),
            ({"route": "other", "status": "404"}, 3),
        ):
            assert server.metric("pgfast_requests_total", **labels) == count
        assert server.metric("pgfast_errors_total", kind="prompt_error") == 1
        assert server.metric("pgfast_request_seconds_count", route="/v1/answer") == 4


def test_answers_are_measured(demo: pgfast.Engine) -> None:
    with serving(demo) as server:
        warm = server.metric("pgfast_batch_size_count")
        assert warm > 0
        found = [server.ask().json for _ in range(3)]
        assert server.metric("pgfast_time_to_first_token_seconds_count") == 3
        total = sum(answer["timings"]["ttft"] for answer in found)
        assert server.metric("pgfast_time_to_first_token_seconds_sum") == pytest.approx(total)
        later = sum(answer["timings"]["decode"] / (len(answer["token_logprobs"]) - 1) for answer in found)
        assert server.metric("pgfast_time_per_later_token_seconds_sum") == pytest.approx(later)
        assert server.metric("pgfast_batch_size_count") > warm
        assert server.metric("pgfast_picture_cache_misses_total") == 1
        assert server.metric("pgfast_picture_cache_hits_total") == 2
        assert server.metric("pgfast_slots") == demo.load_figures().slots


def test_what_is_in_the_house_shows(demo: pgfast.Engine) -> None:
    held = HeldEngine(demo)
    with serving(held) as server, ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(server.ask) for _ in range(5)]
        until(lambda: server.metric("pgfast_requests_in_house") == 5 and len(held.held) == 5)
        held.release()
        assert all(reply.result().status == 200 for reply in asked)
        until(lambda: server.metric("pgfast_requests_in_house") == 0)


def test_the_page_of_metrics_is_prometheus_text(demo: pgfast.Engine) -> None:
    with serving(demo) as server:
        server.ask()
        reply = server.request("GET", "/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
        (sample,) = [s for s in families["pgfast_requests"].samples if s.name == "pgfast_requests_total"]
        assert (sample.labels, sample.value) == ({"route": "/v1/answer", "status": "200"}, 1)
        assert all(family.documentation for family in families.values())
        assert {"pgfast_queue_length", "pgfast_running_rows", "pgfast_batch_size", "pgfast_rejected"} <= families.keys()


def image(size: int = 100) -> EncodedImage:
    return EncodedImage(np.zeros((1, size), np.float32), 1, 1, "bundle")


def with_cache(
    demo: pgfast.Engine, encode: Callable[[Callable[[], bytes]], Encoded], limit: int, use: Any, threads: int = 4
) -> Metrics:
    """Run `use(cache)` in an event loop."""
    metrics = Metrics(demo)
    with ThreadPoolExecutor(threads) as pool:
        asyncio.run(use(PictureCache(encode, pool, limit, metrics)))
    return metrics


def test_the_cache_keeps_what_was_used_last(demo: pgfast.Engine) -> None:
    encoded: list[bytes] = []

    def encode(picture: Callable[[], bytes]) -> Encoded:
        encoded.append(picture())
        return image(), (0.5, 0.25)

    async def use(cache: PictureCache) -> None:
        first, times = await cache.get(b"a")
        assert times == (0.5, 0.25)
        assert await cache.get(b"a") == (first, (0.0, 0.0))
        await cache.get(b"b")
        await cache.get(b"a")
        await cache.get(b"c")  # b goes
        await cache.get(b"a")
        await cache.get(b"b")

    metrics = with_cache(demo, encode, 2 * (400 + OVERHEAD), use)
    assert encoded == [b"a", b"b", b"c", b"b"]
    assert metrics.registry.get_sample_value("pgfast_picture_cache_bytes") == 2 * (400 + OVERHEAD)


def test_a_cache_of_nothing_keeps_nothing(demo: pgfast.Engine) -> None:
    async def use(cache: PictureCache) -> None:
        await cache.get(b"a")
        await cache.get(b"a")

    metrics = with_cache(demo, lambda _: (image(), (0.0, 0.0)), 0, use)
    assert metrics.registry.get_sample_value("pgfast_picture_cache_misses_total") == 2
    assert metrics.registry.get_sample_value("pgfast_picture_cache_bytes") == 0


def test_a_bad_picture_is_everybody_s_error_and_is_not_kept(demo: pgfast.Engine) -> None:
    tried: list[bytes] = []

    def encode(picture: Callable[[], bytes]) -> Encoded:
        tried.append(picture())
        raise ImageError("damaged")

    async def use(cache: PictureCache) -> None:
        found = await asyncio.gather(*(cache.get(b"a") for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in found] == ["damaged"] * 3
        with pytest.raises(ImageError):
            await cache.get(b"a")

    with_cache(demo, encode, 10**6, use)
    assert tried == [b"a", b"a"]


def test_who_gives_up_takes_nothing_from_the_others(demo: pgfast.Engine) -> None:
    go, begun = threading.Event(), threading.Event()
    encoded: list[bytes] = []

    def encode(picture: Callable[[], bytes]) -> Encoded:
        begun.set()
        assert go.wait(WAIT)
        encoded.append(picture())
        return image(), (0.0, 0.0)

    async def use(cache: PictureCache) -> None:
        first, second = (asyncio.create_task(cache.get(b"a")) for _ in range(2))
        queued = asyncio.create_task(cache.get(b"b"))  # behind it in the only thread
        await asyncio.to_thread(begun.wait, WAIT)
        first.cancel()
        queued.cancel()
        await asyncio.wait([first, queued])
        assert first.cancelled()
        again = asyncio.create_task(cache.get(b"b"))  # is not given the encoding that was given up
        await asyncio.sleep(0)
        go.set()
        await second
        await again

    with_cache(demo, encode, 10**6, use, threads=1)
    assert encoded == [b"a", b"b"]


def test_a_picture_that_nobody_wants_any_more_is_let_go_at_once(demo: pgfast.Engine) -> None:
    go, begun = threading.Event(), threading.Event()
    encoded: list[bytes] = []
    pictures = [b"a" * 1000, b"b" * 1000]  # one that has begun, and one in the queue behind it
    counts = [sys.getrefcount(picture) for picture in pictures]

    def encode(picture: Callable[[], bytes]) -> Encoded:
        begun.set()
        assert go.wait(WAIT)
        encoded.append(picture())
        return image(), (0.0, 0.0)

    async def use(cache: PictureCache) -> None:
        tasks = [asyncio.create_task(cache.get(picture)) for picture in pictures]
        await asyncio.to_thread(begun.wait, WAIT)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        del task, tasks
        gc.collect()
        assert [sys.getrefcount(picture) for picture in pictures] == counts
        go.set()

    with_cache(demo, encode, 10**6, use, threads=1)
    assert encoded == []


def test_pictures_of_one_content_share_the_cache_of_a_server(demo: pgfast.Engine) -> None:
    with serving(demo, cache_pictures=0) as server:
        assert [server.ask().json["timings"]["vision"] > 0 for _ in range(2)] == [True, True]
    with serving(demo) as server:
        plain, uri = base64.b64encode(PICTURE).decode(), "data:image/png;base64," + base64.b64encode(PICTURE).decode()
        assert server.ask(image=plain).json["timings"]["vision"] > 0
        assert server.ask(image=uri).json["timings"]["vision"] == 0
