"""Engines and processes: fork after loading says so, a fork may load its own, spawn works; memory that is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pgfast.runtime.providers import Target
from pgfast.runtime.session import failure

ROOT = Path(__file__).parent.parent
START = """
import os, resource, sys, warnings
import numpy as np
import pgfast
from pgfast.loading import demo_bundle
PICTURE = np.full((64, 64, 3), 255, np.uint8)
PICTURE[20:44, 20:44] = (0, 0, 255)
QUESTION = "what color is the shape?"
def ask(engine):
    return engine.answer(PICTURE, QUESTION).text
"""
FORK = (
    START
    + """
engine = pgfast.load(provider="cpu")
if {asked}:
    assert ask(engine) == "blue"
encoded = engine.encode_image(PICTURE)
child = os.fork()
if child == 0:
    for work in (ask, lambda e: e.answer(encoded, QUESTION), lambda e: e.answer_batch([(encoded, QUESTION)]),
                 lambda e: list(e.stream(PICTURE, "answer en " + QUESTION)), lambda e: e.encode_image(PICTURE)):
        try:
            work(engine)
        except pgfast.PgfastError as error:
            print(error)
    engine.close()
    with pgfast.load(provider="cpu") as own:
        print(ask(own), flush=True)
    del engine, work
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print("parent", ask(engine), flush=True)
"""
)
SPAWN = (
    START
    + """
import multiprocessing
def load():
    global ENGINE
    ENGINE = pgfast.load(provider="cpu", threads=1)
def answer(number):
    return ask(ENGINE)
if __name__ == "__main__":
    engine = pgfast.load(provider="cpu")
    assert ask(engine) == "blue"
    with multiprocessing.get_context("spawn").Pool(2, load) as pool:
        print(pool.map(answer, range(6)))
"""
)
MEMORY = (
    START
    + """
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
)


def run(code: str, tmp_path: Path, *, silent: bool = True) -> str:
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not (silent and done.stderr)
    return done.stdout


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not-asked"])
def test_a_fork_is_told_that_the_engine_stayed_behind(tmp_path: Path, asked: bool) -> None:
    told = "the engine was loaded before this process was forked: load it here, or start processes with spawn\n"
    assert run(FORK.replace("{asked}", str(asked)), tmp_path) == told * 5 + "blue\nparent blue\n"


def test_spawned_processes_answer(tmp_path: Path) -> None:
    assert run(SPAWN, tmp_path) == f"{['blue'] * 6}\n"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_that_the_system_refuses_is_said_and_the_engine_goes_on(tmp_path: Path) -> None:
    """ONNX Runtime's own allocations fail here, by a limit on the process."""
    failed = "the vision encoder fails on cpu: out of memory"
    # ONNX Runtime says on stderr which node it was
    assert run(MEMORY, tmp_path, silent=False) == f"{failed}\nblue\n" * 3 + "1500 blue\n"


@pytest.mark.parametrize(
    "said",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
        "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 536870912",
        "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0",
        "std::bad_alloc",
    ],
)
def test_lack_of_memory_blames_nobody(said: str) -> None:
    for target in (Target("cpu"), Target("cuda")):
        error = failure("the decoder fails", target, RuntimeError(said))
        assert type(error).__name__ == "ProviderError"
        assert str(error).startswith(f"the decoder fails on {target.name}: out of memory")
    assert type(failure("x", Target("cpu"), RuntimeError("Invalid rank"))).__name__ == "BundleError"
