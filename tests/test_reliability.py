"""The figures of docs/reliability.md: those of the committed result file, and how they are put there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS
from mutant_runs import Outcome, counted
from pgfast.bench.machine import describe
from pgfast.bench.reliability import BEGIN, END, MOST_SLOPE, main, markdown, put_into, read, write_part

from pgfast.errors import InputError

ROOT = TESTS.parent
RESULTS = "bench/reports/epyc-zen3-2cores-2026-11-25/reliability/results.json"
DOCUMENT = ROOT / "docs" / "reliability.md"


def soak(**changes: Any) -> dict[str, Any]:
    figures = {"answers": 4, "kinds": {"answer": 4}, "threads": 1, "seconds": 2.4, "wrong": 0, "slope": 12.34}
    return figures | {"first": 1_000_000, "last": 2_000_000, "peak": 3_000_000, "more_threads": 0, "more_files": 1} | changes


def test_the_document_shows_the_committed_figures() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert put_into(text, markdown(RESULTS, read(ROOT / RESULTS))) == text


def test_the_committed_figures_are_what_is_promised() -> None:
    parts = read(ROOT / RESULTS)["parts"]
    assert set(parts) == {"bundles", "soak", *(f"fuzz {name}" for name in ("pictures", "manifest", "graphs", "locations"))}
    assert all(part["findings"] == 0 and part["seconds"] >= 600 for name, part in parts.items() if name.startswith("fuzz "))
    bundles = parts["bundles"]
    assert (bundles["count"], bundles["died"]) == (2000, 0)
    assert set(bundles["kinds"]) <= {"answer", "BundleError", "ProviderError", "PromptError", "InputError"}
    for kind, count in bundles["kinds"].items():
        assert sum(counts.get(kind, 0) for counts in bundles["mutations"].values()) == count
    assert parts["soak"]["answers"] >= 20_000
    assert parts["soak"]["slope"] <= MOST_SLOPE
    assert (parts["soak"]["wrong"], parts["soak"]["more_threads"], parts["soak"]["more_files"]) == (0, 0, 0)
    assert sum(parts["soak"]["kinds"].values()) == parts["soak"]["answers"]


def test_the_counts_by_hand() -> None:
    kinds = [("files", "answer"), ("files", "BundleError"), ("bytes", "BundleError"), ("bytes", "died"), ("bytes", "hung")]
    outcomes = [Outcome(seed, mutation, kind, "", True) for seed, (mutation, kind) in enumerate(kinds)]
    assert counted(outcomes) == {
        "count": 5,
        "kinds": {"BundleError": 2, "answer": 1, "died": 1, "hung": 1},
        "mutations": {"bytes": {"BundleError": 1, "died": 1, "hung": 1}, "files": {"answer": 1, "BundleError": 1}},
        "died": 2,
    }


def test_parts_are_joined_and_shown(tmp_path: Path) -> None:
    path, document, machine = tmp_path / "new" / "results.json", tmp_path / "doc.md", describe() | {"commit": "c0ffee"}
    fuzzed = {"seconds": 7, "executions": 12345, "edges": 5, "edges_of_corpus": 4, "findings": 1}
    write_part(path, "fuzz x", {"seconds": 1}, machine)
    write_part(path, "soak", soak(), machine)
    write_part(path, "fuzz x", fuzzed, machine)
    assert list(json.loads(path.read_text())["parts"]) == ["fuzz x", "soak"]
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(path, document)
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| x | 7 | 12,345 | 4 / 5 | 1 |" in text
    assert "4 answers (4 answer) from 1 threads in 2 seconds; 0 wrong. Resident memory 1.0 MB" in text
    assert "+12.3 bytes per answer (promised: at most 200): flat. Threads +0, open files +1." in text
    assert "commit c0ffee" in text
    write_part(path, "soak", soak(slope=200.1), machine)
    main(path, document)
    assert "**not flat**" in document.read_text()


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_document_without_its_marks_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="once each"):
        put_into(text, "figures")


def test_another_files_figures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="not a result file of 'make soak'"):
        read(tmp_path / "x.json")
