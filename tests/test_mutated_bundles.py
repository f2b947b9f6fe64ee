"""Damaged bundles, opened in a child process: an error of pgfast's own or an answer, never the end of the process."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import bundle_mutants
import mutant_runs
import pytest
from bundle_mutants import MUTATIONS, make_mutant
from mutant_runs import Child, counted, run_mutants, table

from pgfast.bundle import Bundle
from pgfast.errors import BundleError
from pgfast.loading import demo_bundle

ALLOWED = {
    "answer",  # the damage changes nothing that is needed, or other weights
    "BundleError",
    "ProviderError",  # this machine has not the memory that the sizes ask for
    "PromptError",  # no room for the question; a tokenizer that makes markers of it
    "InputError",
}


def check(seeds: range, scratch: Path) -> None:
    outcomes = run_mutants(lambda folder, seed: make_mutant(demo_bundle(), folder, seed), seeds, scratch)
    print(table(outcomes))
    wrong = [each for each in outcomes if not each.expected or each.kind not in ALLOWED]
    assert not wrong, wrong[:3]
    assert not [each for each in outcomes if "\n" in each.message and each.kind != "answer"]
    # the damage is damage, and some of it is harmless
    refused = sum(each.kind == "BundleError" for each in outcomes)
    assert 0.6 * len(outcomes) < refused < len(outcomes)


def test_150_damaged_bundles(tmp_path: Path) -> None:
    check(range(11 * 14), tmp_path)


@pytest.mark.slow
def test_2000_damaged_bundles(tmp_path: Path) -> None:
    check(range(1_000, 3_000), tmp_path)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.__name__)
def test_the_good_bundle_stays_good(tmp_path: Path, mutation: object) -> None:
    """Mutants share its files by hard links: none may be written through."""
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in demo_bundle().iterdir() if path.is_file()}
    for round in range(3):
        make_mutant(demo_bundle(), tmp_path / str(round) / "bundle", MUTATIONS.index(mutation) + round * len(MUTATIONS))  # type: ignore[arg-type]
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in demo_bundle().iterdir() if path.is_file()}
    assert before == after


def test_a_child_that_dies_is_noticed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that the tests above can fail."""
    program = tmp_path / "child.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "for line in sys.stdin:\n"
        "    if 'killer' in line: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if 'sleeper' in line: time.sleep(600)\n"
        """    print('{"kind": "answer", "message": "", "pgfast": "True"}', flush=True)\n"""
    )
    monkeypatch.setattr(mutant_runs, "CHILD", program)
    monkeypatch.setattr(mutant_runs, "SECONDS", 2)
    with Child() as child:
        kinds = [child.open(tmp_path / name)["kind"] for name in ("good", "killer", "good", "sleeper", "good")]
        killed = child.open(tmp_path / "killer")
    assert kinds == ["answer", "died", "answer", "hung", "answer"]
    assert killed["message"].startswith(f"exit code {-signal.SIGSEGV}")


@pytest.mark.parametrize("location", bundle_mutants.LOCATIONS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all", "one"])
def test_weights_come_from_the_bundles_own_files_only(tmp_path: Path, location: str, everywhere: bool) -> None:
    import onnx

    folder = tmp_path / "bundle"
    make_mutant(demo_bundle(), folder, MUTATIONS.index(bundle_mutants.external_data))
    (folder / "link.data").unlink(missing_ok=True)  # refused before its graph is looked at
    for path in demo_bundle().iterdir():  # the links and folders stay, the graphs are good again
        if path.is_file():
            bundle_mutants.put(folder / path.name, path.read_bytes())

    def change(model: onnx.ModelProto) -> None:
        external = [tensor for tensor in model.graph.initializer if tensor.external_data]
        for tensor in external if everywhere else external[-1:]:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location

    bundle_mutants._edit_graph(folder, "decoder.onnx", change)
    names = {path.name for path in demo_bundle().iterdir()} - {"pgfast.json"}
    if location in names:
        return  # the bundle's own; ONNX Runtime is asked in the tests above
    with pytest.raises(BundleError, match=r"decoder\.onnx is not a graph that pgfast exports"):
        Bundle.open(folder)


def main() -> None:
    """Print the outcomes of so many mutants, from a seed on, and write them as the part 'bundles': COUNT FIRST [FILE]."""
    import tempfile
    import time

    from pgfast.bench.machine import describe
    from pgfast.bench.reliability import write_part

    count, first = map(int, sys.argv[1:3])
    machine, start = describe(), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run_mutants(
            lambda folder, seed: make_mutant(demo_bundle(), folder, seed), range(first, first + count), Path(scratch)
        )
    print(table(outcomes))
    for each in outcomes:
        if not each.expected or each.kind not in ALLOWED:
            print(each)
    for file in sys.argv[3:]:
        write_part(Path(file), "bundles", counted(outcomes) | {"seconds": time.perf_counter() - start}, machine)


if __name__ == "__main__":
    main()
