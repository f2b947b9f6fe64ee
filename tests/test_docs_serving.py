"""docs/serving.md: its examples run, its numbers are the server's, its figures are those of the result file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pgfast.bench.serving import figures
from pgfast.bench.serving.process import Server
from pgfast.bench.serving.run import read
from pgfast.bench.serving.settings import PGFAST
from prometheus_client import generate_latest

from pgfast.server.cli import serve
from pgfast.server.config import ServerConfig
from pgfast.server.metrics import Metrics

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "serving.md").read_text()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Server([*PGFAST, "serve"], tmp_path_factory.mktemp("docs") / "log") as server:
        yield "{}:{}".format(*server.address)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def run(command: list[str], address: str) -> str:
    here = [word.replace("127.0.0.1:8000", address) for word in command]
    return subprocess.run(here, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_examples_run(address: str) -> None:
    form, as_json, stream = (run(["bash", "-c", block], address) for block in blocks("bash"))
    assert json.loads(form)["text"] == "yes"
    assert json.loads(form)["choices"]["yes"] > 0.99
    answer = json.loads(as_json)
    assert answer["text"] == "blue"
    named = DOCUMENT[DOCUMENT.index("The answer is JSON") : DOCUMENT.index("Optional fields")]
    for name in ("text", "confidence", "token_logprobs", "finish_reason", "choices", "timings"):
        assert name in answer
        assert f"`{name}`" in named
    assert [line for line in stream.splitlines() if line.startswith("event")] == ["event: piece", "event: answer"]


def test_the_openai_example_runs(address: str) -> None:
    (code,) = blocks("python")
    assert run([sys.executable, "-c", code], address) == "blue\n"


def test_the_limits_are_the_servers() -> None:
    config = ServerConfig()
    numbers = {
        "--max-queue": config.max_queue,
        "--timeout": config.timeout,
        "--max-body-mb": config.max_body / 2**20,
        "--max-pixels": config.max_pixels,
        "--cache-pictures": config.cache_pictures / 2**20,
        "--drain-timeout": config.drain_timeout,
    }
    said = dict(re.findall(r"^\| `(--[\w-]+)` \| ([\d,]+)", DOCUMENT, re.MULTILINE))
    assert {flag: float(number.replace(",", "")) for flag, number in said.items()} == numbers
    fixed = DOCUMENT[DOCUMENT.index("Fixed: ") : DOCUMENT.index("A client that goes away")]
    for number in (config.max_connections, config.max_head // 2**10, int(config.head_timeout), config.max_bodies // 2**20):
        assert re.search(rf"\b{number}\b", fixed)
    flags = {option for parameter in serve.params for option in parameter.opts}
    others = {"--only", "--ray"}  # of bench serve; of what is built on this
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", DOCUMENT)) - others <= flags


def test_the_metrics_are_the_servers() -> None:
    engine: Any = SimpleNamespace(load_figures=lambda: SimpleNamespace(waiting=0, running=0, slots=1), on_step=None)
    metrics = generate_latest(Metrics(engine).registry).decode()
    kinds = dict(line.split()[2:4] for line in metrics.splitlines() if line.startswith("# TYPE"))
    has = {name for name in kinds if not name.endswith("_created")}
    assert set(re.findall(r"`(pgfast_\w+)`", DOCUMENT)) == has


def test_the_figures_are_those_of_the_result_file() -> None:
    (name,) = re.findall(r"^From `(.*)`:$", DOCUMENT, re.MULTILINE)
    assert figures.put_into(DOCUMENT, figures.markdown(name, read(ROOT / name))) == DOCUMENT
