"""Rows and pictures for tests of `pgfast batch`, and ways to run it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUESTIONS = ("what color is the shape?", "is there a circle?", "what shape is present?", 'is there a\nred "shape", or not?')


def make_rows(folder: Path, count: int) -> Path:
    """Write rows.jsonl, rows.csv and a picture per four rows; every tenth row is bad."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count // 4):
        pixels = np.full((64, 80, 3), rng.integers(0, 256, 3), np.uint8)
        pixels[20:50, 30:60] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        rows += [{"id": f"{number}-{i}", "image": f"{number:03}.png", "question": text} for i, text in enumerate(QUESTIONS)]
    for row in rows[7::10]:
        row["image"] = "gone.png"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "image", "question"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "pgfast", "batch", *map(str, args)]


def run(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, check=False, timeout=120, **options)


def lines_of(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def whole_outputs(data: Path, folder: Path) -> dict[str, bytes]:
    """What uninterrupted runs over rows.jsonl of `data` write, by the ending of OUT."""
    for kind in ("jsonl", "csv"):
        assert run(data / "rows.jsonl", folder / f"out.{kind}").returncode == 1
    return {kind: (folder / f"out.{kind}").read_bytes() for kind in ("jsonl", "csv")}
