"""The same seed gives the same text in any company: alone, among others, joined in the middle; the demo model, fp32."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgfast import GenerateOptions
from pgfast.engine import Engine
from pgfast.pending import Pending
from pgfast.types import EncodedImage

QUESTIONS = ["what color is the shape?", "is there a circle?", "what is in the picture?", "caption en", "red blue green"]


@pytest.fixture(scope="module")
def images(demo: Engine, picture: np.ndarray) -> list[EncodedImage]:
    return [demo.encode_image(image) for image in (picture, picture[::-1].copy(), 255 - picture)]


asked = st.tuples(
    st.integers(0, 2),
    st.sampled_from(QUESTIONS),
    st.builds(
        GenerateOptions,
        max_new_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.7, 1.5, 4.0]),
        top_k=st.sampled_from([0, 0, 20]),
        top_p=st.sampled_from([1.0, 1.0, 0.9]),
        seed=st.integers(0, 2**31),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    ),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(requests=st.lists(st.tuples(st.integers(0, 15), asked, st.booleans()), min_size=2, max_size=20))
def test_the_same_seed_gives_the_same_text_in_any_company(
    requests: list[Any], demo: Engine, images: list[EncodedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question joins when the decoder begins a certain run."""

    def submit(what: Any, patient: bool = False) -> Pending:
        image, question, options = what
        return demo.submit(images[image], prompt=question, options=options, patient=patient)

    alone = [submit(what).result(20) for _, what, _ in requests]
    left = sorted(range(len(requests)), key=lambda i: requests[i][0])
    found: dict[int, Pending] = {}
    run, runs, lock = demo._model.decoder._run, 0, threading.Lock()

    def join(when: int) -> None:
        with lock:
            while left and requests[left[0]][0] <= when:
                i = left.pop(0)
                found[i] = submit(*requests[i][1:])

    def joining(*args: Any) -> None:  # in the engine's thread
        nonlocal runs
        join(runs)
        runs += 1
        run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(demo._model.decoder, "_run", joining)
        for when in sorted(when for when, _, _ in requests):  # where nobody runs there is nobody to join
            join(when)
            for pending in list(found.values()):
                pending.result(20)
        together = [found[i].result(20) for i in range(len(requests))]
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
