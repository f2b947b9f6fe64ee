"""Engines and processes: fork after loading says so, a fork may load its own, spawn works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
START = """
import os, sys
import numpy as np
import pgfast
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


def run(code: str, tmp_path: Path) -> str:
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not-asked"])
def test_a_fork_is_told_that_the_engine_stayed_behind(tmp_path: Path, asked: bool) -> None:
    told = "the engine was loaded before this process was forked: load it here, or start processes with spawn\n"
    assert run(FORK.replace("{asked}", str(asked)), tmp_path) == told * 5 + "blue\nparent blue\n"


def test_spawned_processes_answer(tmp_path: Path) -> None:
    assert run(SPAWN, tmp_path) == f"{['blue'] * 6}\n"
