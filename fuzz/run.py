"""Runs the fuzz targets, each in a process of its own, and says what came of it: `python -m fuzz.run --seconds 600`.

The corpus of the clone is read and stays as it is. With `--keep` what a run has added is made small and put into it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pgfast.bench.machine import describe
from pgfast.bench.reliability import write_part

from .target import CORPUS

TARGETS = ("pictures", "manifest", "graphs", "locations")
FINDINGS = Path("build/fuzz")
MOST_BYTES = 50_000
"""Of a target's corpus."""
LIMITS = ("-rss_limit_mb=2048", "-timeout=20")
"""Memory of the process, and seconds for one input."""


def command(target: str, *words: str | Path) -> list[str]:
    """Return the command that runs a target."""
    return [sys.executable, "-m", f"fuzz.{target}", *LIMITS, f"-artifact_prefix={FINDINGS / target}-", *map(str, words)]


def run(target: str, seconds: int, found: Path) -> dict[str, Any]:
    """Fuzz one target; `found` collects new inputs. Returns its figures."""
    process = subprocess.run(
        command(target, f"-max_total_time={seconds}", "-print_final_stats=1", "-verbosity=1", found, CORPUS / target),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    said = process.stderr
    (FINDINGS / f"{target}.log").write_text(said)
    status = re.findall(r"^#\d+.*?cov: (\d+) ft: (\d+)", said, re.MULTILINE)
    executions = re.search(r"^stat::number_of_executed_units: +(\d+)", said, re.MULTILINE)
    memory = re.search(r"^stat::peak_rss_mb: +(\d+)", said, re.MULTILINE)
    return {
        "executions": int(executions[1]) if executions else 0,
        "edges": int(status[-1][0]) if status else None,
        "edges_of_corpus": next((int(cov) for cov in re.findall(r"INITED cov: (\d+)", said)), None),
        "peak_megabytes": int(memory[1]) if memory else None,
        "findings": int(process.returncode != 0),
    }


def keep(target: str, found: Path) -> None:
    """Add to the corpus what reaches new code, small files first, within `MOST_BYTES`."""
    with tempfile.TemporaryDirectory() as merged:
        subprocess.run(
            command(target, "-merge=1", merged, CORPUS / target, found),
            capture_output=True,
            check=True,
            text=True,
            errors="replace",
        )
        old = {path.read_bytes() for path in (CORPUS / target).iterdir()}  # their names are of any kind
        assert list(Path(merged).iterdir()), "the merge failed: what was there reaches some code at least"
        room = MOST_BYTES - sum(map(len, old))
        new = [path for path in Path(merged).iterdir() if path.read_bytes() not in old]
        for path in sorted(new, key=lambda path: (path.stat().st_size, path.name)):
            room -= path.stat().st_size
            if room >= 0:
                shutil.copyfile(path, CORPUS / target / path.name)


def main() -> int:
    """Run what the command line says; 1: something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS, help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--keep", action="store_true", help="put new inputs into fuzz/corpus")
    parser.add_argument("--json", type=Path, help="result file, to which the figures are added")
    words = parser.parse_args()
    try:
        version = importlib.metadata.version("atheris")
    except importlib.metadata.PackageNotFoundError:
        print("not run: atheris is not installed (it has wheels for Linux on x86-64)")
        return 0
    os.makedirs(FINDINGS, exist_ok=True)
    machine = describe()
    figures: dict[str, Any] = {}
    for target in words.targets:
        with tempfile.TemporaryDirectory() as found:
            figures[target] = run(target, words.seconds, Path(found))
            if words.keep and not figures[target]["findings"]:
                keep(target, Path(found))
        if words.json:
            write_part(words.json, f"fuzz {target}", {"seconds": words.seconds, "atheris": version, **figures[target]}, machine)
        print(f"{target:10} " + ", ".join(f"{name} {value}" for name, value in figures[target].items()), flush=True)
    if bad := [target for target, each in figures.items() if each["findings"]]:
        print(f"found something: {', '.join(bad)}; the inputs and the logs are in {FINDINGS}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
