"""Damaged picture files: an `ImageError` or an answer, nothing else, within time and memory."""

from __future__ import annotations

import gc
import random
import resource
import struct
import time
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
from picture_files import seeds

from pgfast.engine import Engine
from pgfast.errors import ImageError

SECONDS = 2.0
"""Of processor time for one picture; the largest that is accepted takes less."""
MEGABYTES = 1200
"""What the process may grow by: the largest picture with its alpha, as RGBA and as RGB, is 640."""
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Damage a file in one to four ways."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice((_flip, _flip, _number, _number, _cut, _insert, _remove, _repeat, _move, _splice))(changed, rng, others)
    return _right_checksums(bytes(changed)) if data.startswith(b"\x89PNG") and rng.random() < 0.7 else bytes(changed)


def _place(data: bytearray, rng: random.Random) -> int:
    """More often near the start, where headers are."""
    return rng.randrange(min(len(data), rng.choice((64, 256, len(data) or 1))) or 1)


def _span(data: bytearray, rng: random.Random) -> slice:
    start = _place(data, rng)
    return slice(start, start + rng.choice((1, 2, 4, 8, 12, 30, 200)))


def _flip(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _number(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    """Write another size, length or count: one at the edge of its range, or one near the old one."""
    size, order = rng.choice((1, 2, 4)), rng.choice(("<", ">"))
    place = _place(data, rng)
    old = data[place : place + size]
    if len(old) == size:
        code = order + {1: "B", 2: "H", 4: "I"}[size]
        (value,) = struct.unpack(code, old)
        new = rng.choice(
            (rng.choice(EDGES), value + rng.randint(-3, 3), value * 2, rng.getrandbits(8 * size), rng.randrange(9000))
        )
        data[place : place + size] = struct.pack(code, new % 2 ** (8 * size))


def _cut(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _insert(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    place = _place(data, rng)
    data[place:place] = rng.choice((rng.randbytes(rng.choice((1, 2, 4, 30))), b"\0" * 16, b"\xff" * 16))


def _remove(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    del data[_span(data, rng)]


def _repeat(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    span = _span(data, rng)
    data[span.start : span.start] = data[span] * rng.choice((1, 1, 2, 50))


def _move(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    span = _span(data, rng)
    block = data[span]
    del data[span]
    place = _place(data, rng)
    data[place:place] = block


def _splice(data: bytearray, rng: random.Random, others: list[bytes]) -> None:
    other = rng.choice(others)
    place = rng.randrange(len(data) + 1)
    data[place:] = other[rng.randrange(len(other)) :]


def _right_checksums(png: bytes) -> bytes:
    """Mend the checksums, so that Pillow reads on instead of stopping at the first one."""
    out, place = bytearray(png[:8]), 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4])
        body = png[place + 4 : place + 8 + length]
        out += png[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return bytes(out + png[place:])


@dataclass
class Seen:
    answers: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")


def answer_damaged(engine: Engine, count: int, seed: int) -> Seen:
    """Ask about `count` damaged pictures; anything but an `ImageError` or an answer fails."""
    rng, seen = random.Random(seed), Seen()
    files = seeds()
    names, others = list(files), list(files.values())
    for number in range(count):
        name = names[number % len(names)]
        data = mutate(files[name], rng, others)
        start = time.process_time()
        try:
            answer = engine.answer(data, "what color is the shape?")
            assert answer.text is not None
            seen.answers += 1
        except ImageError as error:
            message = str(error)
            assert "\n" not in message
            assert message.startswith("the picture "), message
            seen.refused[" ".join(message.split()[:4])] += 1
        seconds = time.process_time() - start
        if seconds > seen.slowest[0]:
            seen.slowest = seconds, f"{number}: {name}"
    return seen


def peak() -> float:
    """Most memory that this process ever had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(
    ("count", "seed"), [pytest.param(500, 1, id="500"), pytest.param(5000, 2, id="5000", marks=pytest.mark.slow)]
)
def test_damaged_pictures(count: int, seed: int, demo: Engine) -> None:
    demo.answer(seeds()["png"], "what color is the shape?")
    gc.collect()
    before = peak()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        seen = answer_damaged(demo, count, seed)
        took = time.perf_counter() - start
    print(
        f"\n{count} damaged pictures of {len(seeds())} kinds in {took:.1f} s: {seen.answers} answers, "
        f"{seen.refused.total()} refused {dict(seen.refused.most_common(8))}; slowest {seen.slowest[0]:.2f} s "
        f"(number {seen.slowest[1]}), {peak() - before:.0f} MB more"
    )
    assert [str(warning.message) for warning in caught] == []
    assert seen.answers + seen.refused.total() == count
    assert min(seen.answers, seen.refused.total()) > count / 10  # neither all harmless nor all hopeless
    assert seen.slowest[0] < SECONDS, seen.slowest
    assert peak() - before < MEGABYTES
