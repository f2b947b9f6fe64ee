"""Memory that runs out, on a device or in the system: an error that says so for those in flight, and the engine goes on."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pgfast
from pgfast import Engine, GenerateOptions
from pgfast.bundle import Bundle
from pgfast.errors import ProviderError
from pgfast.loading import demo_bundle
from pgfast.runtime import buffers
from pgfast.runtime.model import Model
from pgfast.runtime.providers import Target
from pgfast.runtime.session import failure

QUESTION = "what color is the shape?"
CUDA = (
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; file=cuda_call.cc ; expr=cudaMalloc"
)
ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
    "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 536870912"
)


class Starved:
    """A session that has no memory for its runs."""

    def __init__(self, said: str) -> None:
        self._said = said

    def run_with_iobinding(self, binding: Any) -> None:
        raise RuntimeError(self._said)

    def run(self, names: Any, values: Any) -> Any:
        raise RuntimeError(self._said)


@pytest.mark.parametrize("said", [CUDA, ARENA, "std::bad_alloc"])
def test_those_in_flight_get_the_error_and_the_next_ones_an_answer(
    demo: Engine, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    image = demo.encode_image(picture)
    wanted = demo.answer(image, QUESTION)
    decoder: Any = demo._model.decoder
    run, starving = decoder._run, False
    monkeypatch.setattr(decoder, "_run", lambda session, binding: run(Starved(said) if starving else session, binding))
    long = GenerateOptions(max_new_tokens=60, temperature=100.0, seed=1)
    streams = [demo.stream(image, "what", options=dataclasses.replace(long, seed=seed)) for seed in range(3)]
    for stream in streams:
        next(stream)
    starving = True
    waiting = demo.submit(image, QUESTION, choices=["blue", "red"])
    for work in (*(lambda stream=stream: list(stream) for stream in streams), waiting.result):
        with pytest.raises(ProviderError, match="the decoder fails on cpu: out of memory, fewer questions at once"):
            work()
    starving = False
    for _ in range(2):
        answer = demo.answer(image, QUESTION)
        assert (answer.token_ids, answer.token_logprobs) == (wanted.token_ids, pytest.approx(wanted.token_logprobs, abs=1e-4))
    assert (demo.load_figures().waiting, demo.load_figures().running) == (0, 0)


def test_the_vision_encoder_without_memory(demo: Engine, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = demo.answer(picture, QUESTION).text
    with monkeypatch.context() as patch:
        patch.setitem(demo._model._sessions, ("vision_encoder", ()), Starved(CUDA))
        patch.setitem(demo._model._sessions, ("vision_encoder", None), Starved(CUDA))
        with pytest.raises(ProviderError, match="the vision encoder fails on cpu: out of memory"):
            demo.answer(picture, QUESTION)
    assert demo.answer(picture, QUESTION).text == wanted


def test_a_cache_that_does_not_fit_is_said_and_made_when_it_does(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    with pgfast.load(provider="cpu") as engine:

        def full(*args: Any) -> Any:
            raise MemoryError("Unable to allocate 16.0 GiB")

        with monkeypatch.context() as patch:
            patch.setattr(buffers.SlotBuffer, "__init__", full)
            with pytest.raises(ProviderError, match=r"no room for 16 sequences of \d+ positions on cpu: out of memory"):
                engine.answer(picture, QUESTION)
        assert engine.answer(picture, QUESTION).text == "blue"


def test_a_bundle_that_does_not_fit_is_the_machines_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Model, "__init__", full)
    for provider, said in (
        ("cpu", "the bundle on cpu: out of memory"),
        ("auto", "no provider works: .*the bundle on cpu: out of"),
    ):
        with pytest.raises(ProviderError, match=said):
            pgfast.load(demo_bundle(), provider=provider)
    assert Bundle.open(demo_bundle()).manifest


@pytest.mark.parametrize("said", [CUDA, ARENA, "std::bad_alloc"])
def test_lack_of_memory_blames_no_bundle(said: str) -> None:
    for target in (Target("cpu"), Target("cuda")):
        error = failure("the decoder fails", target, RuntimeError(said))
        assert isinstance(error, ProviderError)
        assert str(error).startswith(f"the decoder fails on {target.name}: out of memory")
        assert "\n" not in str(error)
    assert type(failure("x", Target("cpu"), RuntimeError("Invalid rank"))).__name__ == "BundleError"


LIMITED = """
import resource
import numpy as np
import pgfast
picture = np.full((64, 64, 3), 255, np.uint8)
picture[20:44, 20:44] = (0, 0, 255)
def ask(engine):
    return engine.answer(picture, "what color is the shape?").text
engine = pgfast.load(provider="cpu", threads=1)
assert ask(engine) == "blue"
size = engine.manifest.image.size
pixels = np.zeros((1500, 3, size, size), np.float32)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
for more in (64, 128, 256):
    resource.setrlimit(resource.RLIMIT_AS, (now + more * 2**20, hard))
    try:
        engine._model.encode(pixels)
    except pgfast.errors.ProviderError as error:
        print(str(error).split(",")[0])
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    print(ask(engine))
print(len(engine._model.encode(pixels)), ask(engine))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_the_system_refuses_memory(tmp_path: Path) -> None:
    """ONNX Runtime's own allocations fail here, by a limit on the process."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the vision encoder fails on cpu: out of memory\nblue\n" * 3 + "1500 blue\n"
