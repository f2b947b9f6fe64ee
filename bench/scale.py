"""What Ray costs on this machine, with the demo model: `python -m pgfast.bench.scale`; JSON on stdout.

One process against engines in Ray's actors over the same rows, each picture a file of its own; then the way alone: rows
through actors that only hand back a result, and results into the journal.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

import pgfast
from pgfast.batch.answering import answer_rows
from pgfast.batch.journal import Journal
from pgfast.batch.rows import Defaults, Result, Row, to_row
from pgfast.image import open_image, squash
from pgfast.manifest import ImageSpec
from pgfast.scale.batch import answer_on_ray
from pgfast.scale.cluster import HERE, Cluster, connected
from pgfast.scale.columns import pack, unpack_result, unpack_row
from pgfast.scale.processor import PgfastProcessorConfig, map_engines

from .machine import describe


class Echo:
    """An actor without an engine: gives every row the same result."""

    def __init__(self, *, result: Result, **_: Any) -> None:
        self._result = result

    def __call__(self, table: Any) -> dict[str, list[bytes]]:
        """As `RowsWorker`."""
        return {"result": [pack(self._result) for row in table["row"].to_pylist() if unpack_row(row)]}


@click.command()
@click.option("--rows", "count", default=4000, show_default=True, help="Questions, each about a picture of its own.")
@click.option("--rounds", default=3, show_default=True)
def main(count: int, rounds: int) -> None:
    """Measure, all in turns, and print results.json."""
    figures: dict[str, list[float]] = {}

    def note(name: str, seconds: float, rows: int) -> None:
        figures.setdefault(name, []).append(rows / seconds)

    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(Path(folder), count)
        for _ in range(rounds):
            for threads in (1, 2):
                with pgfast.load(threads=threads, provider="cpu") as engine:
                    list(answer_rows(engine, rows[:64]))
                    _, seconds, _ = timed(answer_rows(engine, rows))
                note(f"one process, {threads} threads: answers/s", seconds, count)
            for engines, cpus in ((1, 1), (1, 2), (2, 1)):
                cluster = Cluster(HERE, engines, cpus, None, "cpu", None)
                before, seconds, results = timed(answer_on_ray(rows, cluster))
                # the first block's rows came before the clock
                note(f"Ray, {engines} x {cpus} cores: answers/s", seconds, count - 64)
                figures.setdefault(f"Ray, {engines} x {cpus} cores: seconds to the first answer", []).append(before)
            note("the way alone, 64 rows a task: rows/s", *echo(rows * 5, results[0], 64))
            note("the way alone, 1024 rows a task: rows/s", *echo(rows * 5, results[0], 1024))
            note("journal: rows/s", *journal(Path(folder) / "out.jsonl", results))
    for name, size in (("640 x 480", (640, 480)), ("4000 x 3000", (4000, 3000))):
        figures[f"opening a JPEG of {name}: ms"] = [1000 * opening(size) for _ in range(rounds)]
    summary = {name: {"median": round(statistics.median(v), 1), "all": [round(x, 1) for x in v]} for name, v in figures.items()}
    click.echo(json.dumps({"machine": describe(), "rows": count, "figures": summary}, indent=2))


def make_rows(folder: Path, count: int) -> list[Row]:
    """Write pictures that differ in one pixel, and ask about each."""
    from PIL import Image

    with Image.open(Path(pgfast.__file__).parent / "demo" / "blue_circle.png") as picture:
        for i in range(count):
            picture.putpixel((i % 64, 0), (i // 64 % 256, i // 16384, 0))
            picture.save(folder / f"{i}.png")
    questions = ("what color is the shape?", "what shape is in the image?")
    return [to_row(i, {"image": f"{i}.png", "question": questions[i % 2]}, str(folder), Defaults()) for i in range(count)]


def timed(results: Iterable[Result]) -> tuple[float, float, list[Result]]:
    """Return the seconds to the first result, those of the others, and all results."""
    start = time.perf_counter()
    found, first = [], 0.0
    for result in results:
        first = first or time.perf_counter()
        found.append(result)
    return first - start, time.perf_counter() - first, found


def echo(rows: list[Row], result: Result, size: int) -> tuple[float, int]:
    """Send rows through Ray Data without an engine; seconds and rows after the first block."""
    import pyarrow as pa
    import ray

    cluster = Cluster(HERE, 1, 1, None, "cpu", None)
    with connected(cluster):
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        blocks: Any = [ray.put(pa.table({"row": [pack(row) for row in part]})) for part in parts]
        dataset = map_engines(ray.data.from_arrow_refs(blocks), Echo, PgfastProcessorConfig(batch_size=size), result=result)
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        _, seconds, found = timed(unpack_result(value.as_py()) for batch in batches for value in batch["result"])
    return seconds, len(found) - size


def opening(size: tuple[int, int]) -> float:
    """Seconds on one core from a JPEG's bytes (soft noise, quality 85) to a model's 224 x 224 pixels; the median of 9."""
    from PIL import Image, ImageFilter

    buffer, spec = io.BytesIO(), ImageSpec(224, [0.5] * 3, [0.5] * 3, 1 / 255, "bicubic")
    noise = [Image.effect_noise(size, 80).filter(ImageFilter.GaussianBlur(2)) for _ in range(3)]
    Image.merge("RGB", noise).save(buffer, "JPEG", quality=85)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        squash(open_image(buffer.getvalue()), spec)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def journal(path: Path, results: list[Result]) -> tuple[float, int]:
    """Append results to a new journal; seconds and rows."""
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    with Journal(path, {"bench": "scale"}) as out:
        for result in results:
            out.append(result)
        out.finish()
    return time.perf_counter() - start, len(results)


if __name__ == "__main__":
    main()
