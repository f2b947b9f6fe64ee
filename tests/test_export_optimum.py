"""`optimum-cli export pgfast`, where optimum is installed beside pgfast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pgfast.bundle import Bundle

OPTIMUM = Path(sys.executable).parent / "optimum-cli"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([OPTIMUM, "export", "pgfast", *args], capture_output=True, text=True, check=False)


def test_optimum_writes_the_same_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    wanted = Bundle.open(bundle).manifest
    done = run("--model", str(checkpoint), str(tmp_path / "out"), "--target", wanted.target)
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "out").manifest == wanted


def test_its_errors_are_ours(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("pgfast: error: no config.json")
