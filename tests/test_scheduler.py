"""The scheduler on a decoder without a model: who runs when, and that nobody notices the others."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fake_decoder import VOCABULARY, FakeDecoder, fake_features, fake_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from pgfast import GenerateOptions
from pgfast.errors import OverloadedError, PgfastError, ProviderError
from pgfast.runtime.beam_search import BeamSearch
from pgfast.runtime.generation import ChoiceScores, Ending, Generation
from pgfast.runtime.sampling import log_softmax, sample
from pgfast.runtime.scheduler import Scheduler, Ticket

EOS = 1
ENDLESS = 30


SIX = GenerateOptions(max_new_tokens=6)


def generation(options: GenerateOptions = SIX, eos: int = EOS) -> Any:
    stop = options.stop

    def stopped(ids: Sequence[int]) -> bool:
        return any(text in "".join(map(chr, (97 + token for token in ids))) for text in stop)

    ending = Ending(options.max_new_tokens or 6, eos, stopped if stop else None)
    return (Generation if options.beams == 1 else BeamSearch)(options, ending)


def endless() -> Generation:
    """Greedy, up to the limit of the fake decoder."""
    return generation(GenerateOptions(max_new_tokens=ENDLESS), eos=-1)


def alone(picture: int, prompt: Sequence[int], options: GenerateOptions) -> tuple[list[int], list[float]]:
    """What `generation` must give, written down without slots, batches and threads."""
    if options.beams > 1:
        return searched_alone(picture, prompt, options)
    ids: list[int] = []
    logprobs: list[float] = []
    rng = np.random.default_rng(options.seed)
    while len(ids) < (options.max_new_tokens or 6):
        logits = fake_logits(picture, (*prompt, *ids))
        token = int(logits.argmax())
        if options.temperature:
            o = options
            token = sample(logits, temperature=o.temperature, top_k=o.top_k, top_p=o.top_p, rng=rng)
        ids.append(token)
        logprobs.append(float(log_softmax(logits)[token]))
        if token == EOS or any(text in "".join(chr(97 + i) for i in ids) for text in options.stop):
            break
    return ids, logprobs


def searched_alone(picture: int, prompt: Sequence[int], options: GenerateOptions) -> tuple[list[int], list[float]]:
    """The same for beams: every continuation of every beam is looked at, nothing is kept in places."""

    def ends(ids: tuple[int, ...]) -> bool:
        text = "".join(chr(97 + i) for i in ids)
        return ids[-1] == EOS or len(ids) == (options.max_new_tokens or 6) or any(stop in text for stop in options.stop)

    def logprobs(ids: tuple[int, ...]) -> list[float]:
        return [float(log_softmax(fake_logits(picture, (*prompt, *ids[:i])))[token]) for i, token in enumerate(ids)]

    def score(ids: tuple[int, ...]) -> float:
        return sum(logprobs(ids)) / len(ids) ** options.length_penalty

    running: list[tuple[int, ...]] = [()]
    complete: list[tuple[int, ...]] = []
    while running:
        longer = [(*ids, token) for ids in running for token in range(VOCABULARY)]
        longer = sorted(longer, key=lambda ids: -sum(logprobs(ids)))[: 2 * options.beams]
        complete += [ids for ids in longer[: options.beams] if ends(ids)]
        complete = sorted(complete, key=lambda ids: -score(ids))[: options.beams]
        running = [ids for ids in longer if not ends(ids)][: options.beams]
        if len(complete) == options.beams and running and score(running[0]) <= score(complete[-1]):
            break
    return list(complete[0]), logprobs(complete[0])


def scores_alone(picture: int, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[list[float]]:
    return [
        [float(log_softmax(fake_logits(picture, (*prompt, *ids[:i])))[token]) for i, token in enumerate(ids)] for ids in choices
    ]


options_strategy = st.builds(
    GenerateOptions,
    max_new_tokens=st.integers(1, 8),
    temperature=st.sampled_from([0.0, 0.0, 1.5]),
    top_k=st.sampled_from([0, 3]),
    seed=st.integers(0, 5),
    stop=st.sampled_from([(), (), ("c",), ("ab", "d")]),
)
beams_strategy = st.builds(
    GenerateOptions,
    max_new_tokens=st.integers(1, 6),
    beams=st.integers(2, 4),
    length_penalty=st.sampled_from([1.0, 0.0, 2.0, -1.0]),
    stop=st.sampled_from([(), (), ("c",), ("ab", "d", "e", "f", "g", "h")]),
)
choices_strategy = st.lists(st.lists(st.integers(2, VOCABULARY - 1), max_size=4), min_size=1, max_size=5, unique_by=tuple).map(
    lambda choices: [[*ids, EOS] for ids in choices]
)
requests_strategy = st.lists(
    st.tuples(
        st.integers(0, 10),  # joins before this run
        st.integers(0, 3),  # picture
        st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=3),
        st.one_of(options_strategy, choices_strategy, beams_strategy),
        st.booleans(),  # patient
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(requests_strategy, st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_any_mix_joining_at_any_step_equals_one_by_one(requests: list[Any], slots: int, together: int, burst: int) -> None:
    decoder = FakeDecoder(slots)
    scheduler = Scheduler(decoder, together=together, max_burst=burst)
    left = sorted(enumerate(requests), key=lambda item: item[1][0])
    submitted: list[tuple[Any, Ticket]] = []
    joining = threading.Lock()

    def join(run: int) -> None:
        with joining:
            while left and left[0][1][0] <= run:
                _, (_, picture, prompt, what, patient) = request = left.pop(0)
                if isinstance(what, GenerateOptions):
                    what = dataclasses.replace(what, beams=min(what.beams, slots))
                    request = (*request[:1], (_, picture, prompt, what, patient))
                row = generation(what) if isinstance(what, GenerateOptions) else ChoiceScores(what)
                submitted.append((request, scheduler.submit(row, fake_features(picture), prompt, patient=patient)))

    decoder.before_run = join
    while left or not all(ticket.finished for _, ticket in submitted):
        join(left[0][1][0] if left else 0)  # nobody is running: the next ones come
        submitted[-1][1].wait()
        for _, ticket in submitted:  # it grows meanwhile
            ticket.wait()
    scheduler.close()
    for (_, (_, picture, prompt, what, _)), ticket in submitted:
        if isinstance(what, GenerateOptions):
            ids, logprobs = alone(picture, prompt, what)
            assert ticket.row.token_ids == ids
            assert ticket.row.token_logprobs == pytest.approx(logprobs, abs=1e-5)
        else:
            for found, wanted in zip(ticket.row.scores, scores_alone(picture, prompt, what), strict=True):
                assert found == pytest.approx(wanted, abs=1e-9)
    assert len(submitted) == len(requests)
    assert len(decoder.threads) == 1
    admitted = [ids for run in decoder.runs if run[0] == "prompt" for ids in run[2]]
    assert admitted == [tuple(request[2]) for (_, request), _ in submitted]  # first come, first served


class Held:
    """A scheduler whose decoder waits before every run until it is let go."""

    def __init__(self, slots: int = 2, **options: Any) -> None:
        self.decoder = FakeDecoder(slots)
        self.scheduler = Scheduler(self.decoder, **options)
        self._go, self._reached = threading.Semaphore(0), threading.Semaphore(0)
        self.decoder.before_run = self._hold

    def _hold(self, run: int) -> None:
        self._reached.release()
        assert self._go.acquire(timeout=20)

    def runs(self, count: int) -> None:
        """Let so many runs happen, and wait until the next one stands at its beginning."""
        for _ in range(count):
            self._go.release()
            self.wait_for_run()

    def wait_for_run(self) -> None:
        assert self._reached.acquire(timeout=20)

    def free(self) -> None:
        self.decoder.before_run = lambda run: None
        self._go.release(1000)

    def submit(self, prompt: int, row: Any = None, **options: Any) -> Ticket:
        return self.scheduler.submit(row or endless(), fake_features(0), [prompt], **options)


@pytest.fixture
def held() -> Any:
    made: list[Held] = []

    def make(slots: int = 2, **options: Any) -> Held:
        made.append(Held(slots, **options))
        return made[-1]

    yield make
    for each in made:
        each.free()
        each.scheduler.close()


def kinds(decoder: FakeDecoder) -> str:
    return "".join(run[0][0] for run in decoder.runs)


def test_one_prompt_between_two_steps_so_that_nobody_stands_still(held: Callable[..., Held]) -> None:
    h = held(8, together=4)
    first = h.submit(2)
    h.wait_for_run()
    rest = [h.submit(number) for number in range(3, 7)]
    h.free()
    for ticket in (first, *rest):
        ticket.wait()
    assert kinds(h.decoder).startswith("pspspspsps")
    assert [run[1] for run in h.decoder.runs if run[0] == "step"][:5] == [1, 2, 3, 4, 5]


def test_patient_requests_are_let_in_together_and_first(held: Callable[..., Held]) -> None:
    h = held(6, together=3)
    tickets = [h.submit(2, patient=True)]
    h.wait_for_run()
    tickets += [h.submit(number, patient=True) for number in range(3, 9)]
    h.free()
    for ticket in tickets:
        ticket.wait()
    assert [len(run[2]) for run in h.decoder.runs if run[0] == "prompt"] == [1, 3, 2, 1]
    assert kinds(h.decoder).startswith("ppps")  # the seventh waits for a place


def test_patient_newcomers_do_not_keep_others_waiting(held: Callable[..., Held]) -> None:
    h = held(8, together=2)
    tickets = [h.submit(2)]
    h.wait_for_run()
    tickets += [h.submit(number, patient=True) for number in range(3, 7)]
    h.free()
    for ticket in tickets:
        ticket.wait()
    assert kinds(h.decoder).startswith("pspsps")


def test_a_newcomer_takes_the_lowest_free_slot_and_the_batch_shrinks_again(held: Callable[..., Held]) -> None:
    h = held(3)
    tickets = [h.submit(2), h.submit(3), h.submit(4)]
    h.wait_for_run()
    h.runs(6)  # all three have their prompt
    tickets[1].cancel()
    late = h.submit(5)
    tickets[2].cancel()
    h.runs(2)
    assert h.decoder.runs[-1] in (("prompt", 1, [(5,)]), ("step", 2, 1))
    late.cancel()
    h.runs(2)
    assert h.decoder.runs[-1] == ("step", 1, 1)


def test_cancelling_frees_the_slot_or_the_place_in_the_queue(held: Callable[..., Held]) -> None:
    h = held(1)
    running, waiting, third = h.submit(2), h.submit(3), h.submit(4)
    h.wait_for_run()
    h.runs(1)
    waiting.cancel()
    with pytest.raises(PgfastError, match="cancelled"):
        waiting.wait()
    running.cancel()
    h.free()
    third.wait()
    with pytest.raises(PgfastError, match="cancelled"):
        running.wait()
    assert [run[2] for run in h.decoder.runs if run[0] == "prompt"] == [[(2,)], [(4,)]]
    third.cancel()  # too late: nothing happens
    third.wait()
    assert len(third.row.token_ids) == ENDLESS


def test_a_reader_that_leaves_frees_the_slot(held: Callable[..., Held]) -> None:
    h = held(1)
    ticket = h.submit(2, streaming=True)
    progress = ticket.progress()
    h.wait_for_run()
    h.runs(1)
    assert next(progress) is False
    assert len(ticket.row.token_ids) == 1
    progress.close()
    following = h.submit(3)
    h.free()
    following.wait()
    assert h.decoder.runs.count(("step", 1, 1)) <= ENDLESS + 1


def test_a_stream_reports_every_token_and_the_end() -> None:
    scheduler = Scheduler(FakeDecoder(2))
    row = generation()
    ticket = scheduler.submit(row, fake_features(1), [5], streaming=True)
    seen = list(ticket.progress())
    assert seen[-1] is True
    assert row.token_ids == alone(1, [5], GenerateOptions(max_new_tokens=6))[0]
    assert 1 <= len(seen) <= len(row.token_ids)
    ticket.wait()  # again: at once
    scheduler.close()


def test_a_failing_run_fails_those_in_flight_and_nobody_else(held: Callable[..., Held]) -> None:
    h = held(2)
    running = [h.submit(2), h.submit(3)]
    h.wait_for_run()
    h.runs(3)
    waiting = h.submit(4)

    def fail(run: int) -> None:
        h.decoder.before_run = lambda run: None
        raise ProviderError("the decoder fails on cuda: out of memory")

    h.decoder.before_run = fail
    h._go.release()
    for ticket in running:
        with pytest.raises(ProviderError, match="out of memory"):
            ticket.wait()
    waiting.wait()
    assert len(waiting.row.token_ids) == ENDLESS


def test_a_row_that_raises_fails_alone() -> None:
    scheduler = Scheduler(FakeDecoder(2))

    def broken(ids: Sequence[int]) -> bool:
        raise ZeroDivisionError

    row = Generation(GenerateOptions(stop=("a",)), Ending(5, EOS, broken))
    good = scheduler.submit(endless(), fake_features(0), [3])
    with pytest.raises(ZeroDivisionError):
        scheduler.submit(row, fake_features(0), [2]).wait()
    good.wait()
    scheduler.close()


def test_too_many_waiting_are_refused(held: Callable[..., Held]) -> None:
    h = held(1, max_waiting=2)
    running = h.submit(2)
    h.wait_for_run()
    waiting = [h.submit(3), h.submit(4)]
    with pytest.raises(OverloadedError, match="2 requests are waiting"):
        h.submit(5)
    waiting[0].cancel()
    waiting.append(h.submit(6))
    h.free()
    for ticket in (running, *waiting[1:]):
        ticket.wait()


def test_closing_fails_everyone_and_ends_the_thread(held: Callable[..., Held]) -> None:
    h = held(1)
    started = []
    running, waiting = h.submit(2), h.submit(3, on_start=lambda: started.append(1))
    h.wait_for_run()
    closing = threading.Thread(target=h.scheduler.close)
    closing.start()
    with pytest.raises(PgfastError, match="closed"):
        waiting.wait()
    assert started == [1]
    h.free()
    closing.join()
    with pytest.raises(PgfastError, match="closed"):
        running.wait()
    assert not h.scheduler._thread.is_alive()
    with pytest.raises(PgfastError, match="closed: load the bundle again"):
        h.submit(4)
    h.scheduler.close()


def test_bursts_are_for_greedy_rows_while_nobody_waits(held: Callable[..., Held]) -> None:
    h = held(2, max_burst=8)
    first = h.submit(2)
    h.wait_for_run()
    h.runs(1)  # at its first step
    assert h.scheduler._burst(0) == 1
    second = h.submit(3, generation(GenerateOptions(max_new_tokens=9, temperature=1.0, seed=0), eos=-1))
    h.free()
    second.wait()
    first.wait()
    bursts = [run[2] for run in h.decoder.runs if run[0] == "step"]
    assert bursts[0] == 8  # alone
    assert bursts[1:9] == [1] * 8  # beside a sampled row, for its eight further tokens
    assert bursts[9:] == [8, 5]  # alone again, and not past the limit
    stop = generation(GenerateOptions(max_new_tokens=9, stop=("zz",)), eos=-1)
    h.submit(2, stop).wait()
    assert [run[2] for run in h.decoder.runs][-8:] == [1] * 8


def test_choices_run_their_prompt_once_and_what_they_share_once() -> None:
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder)
    choices = [[2, 3, 4, EOS], [2, 3, EOS], [2, 5, EOS], [6, EOS]]
    row = ChoiceScores(choices)
    scheduler.submit(row, fake_features(2), [7, 8]).wait()
    scheduler.close()
    assert kinds(decoder) == "p" + "s" * 5  # 2, 23, 234, 25, 6
    for found, wanted in zip(row.scores, scores_alone(2, [7, 8], choices), strict=True):
        assert found == pytest.approx(wanted, abs=1e-9)
