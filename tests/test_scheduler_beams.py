"""Requests of several beams among others, on a decoder without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_decoder import FakeDecoder, fake_features
from test_scheduler import EOS, Held, endless, generation, held, kinds

from pgfast import GenerateOptions
from pgfast.errors import PgfastError, ProviderError
from pgfast.runtime.scheduler import Scheduler

__all__ = ["held"]


def beams(number: int, tokens: int = 8) -> Any:
    return generation(GenerateOptions(max_new_tokens=tokens, beams=number), eos=-1)


def prompts(decoder: FakeDecoder) -> list[int]:
    """First token of each prompt, in order."""
    return [run[2][0][0] for run in decoder.runs if run[0] == "prompt"]


def test_a_wide_request_is_not_overtaken_and_gets_its_turn(held: Callable[..., Held]) -> None:
    h = held(4)
    short = [h.submit(2, generation(GenerateOptions(max_new_tokens=3), eos=-1)), h.submit(3)]
    h.wait_for_run()
    wide, narrow = h.submit(4, beams(4)), h.submit(5)
    h.runs(8)
    assert prompts(h.decoder) == [2, 3]  # three slots are free, and the narrow one stands behind
    short[1].cancel()
    h.free()
    for ticket in (short[0], wide, narrow):
        ticket.wait()
    assert prompts(h.decoder) == [2, 3, 4, 5]
    assert len(wide.row.token_ids) == 8


def test_several_wide_requests_share_the_slots_in_turn() -> None:
    decoder = FakeDecoder(5)
    scheduler = Scheduler(decoder, together=3)
    tickets = [scheduler.submit(beams(2 + i % 4), fake_features(i % 3), [2 + i], patient=bool(i % 2)) for i in range(10)]
    for ticket in tickets:
        ticket.wait(20)
    scheduler.close()
    assert prompts(decoder) == list(range(2, 12))
    assert not any(decoder.ids)


def test_beams_and_others_share_every_step(held: Callable[..., Held]) -> None:
    h = held(4)
    wide, single = h.submit(2, beams(3)), h.submit(3, generation(GenerateOptions(max_new_tokens=9), eos=-1))
    h.free()
    wide.wait()
    single.wait()
    assert kinds(h.decoder) in ("pp" + "s" * 8, "psp" + "s" * 8)  # a step of its own before the other came


@pytest.mark.parametrize("way", ["cancel", "row", "run"])
def test_all_slots_are_free_again_after(way: str, held: Callable[..., Held]) -> None:
    h = held(3)
    row = beams(3)
    if way == "row":
        row._candidates = lambda position: 1 // 0
    wide = h.submit(2, row)
    h.wait_for_run()
    if way == "cancel":
        h.runs(3)
        wide.cancel()
    elif way == "run":
        h.runs(3)

        def fail(run: int) -> None:
            h.decoder.before_run = lambda run: None
            raise ProviderError("the decoder fails")

        h.decoder.before_run = fail
        h._go.release()
    if way != "run":
        h.free()
    with pytest.raises(ZeroDivisionError if way == "row" else PgfastError):
        wide.wait()
    again = h.submit(3, beams(3))
    again.wait()
    assert len(again.row.token_ids) == 8
    assert h.scheduler.load() == (0, 0)
    assert not any(h.decoder.ids)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_slot_that_cannot_be_released_does_not_end_the_thread(broken: int) -> None:
    decoder = FakeDecoder(3)
    scheduler = Scheduler(decoder)
    release = decoder.release

    def fail_once(row: int) -> None:
        if row == broken:
            decoder.release = release  # type: ignore[method-assign]
            raise RuntimeError("no release")
        release(row)

    decoder.release = fail_once  # type: ignore[method-assign]
    first = scheduler.submit(beams(3), fake_features(0), [2])
    with pytest.raises(RuntimeError, match="no release"):
        first.wait(20)
    assert [bool(ids) for ids in decoder.ids] == [slot == broken for slot in range(3)]  # the others are free
    decoder.ids[broken] = ()
    second = scheduler.submit(endless(), fake_features(0), [3])
    second.wait(20)
    scheduler.close()
    assert second.row.token_ids
    assert EOS not in first.row.token_ids
