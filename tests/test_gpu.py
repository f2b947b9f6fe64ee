"""What `bench/gpu_checks.py` checks on a GPU; its comparisons themselves are tried on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from pgfast.bench import gpu_checks, gpu_session
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_checks.small_checkpoint(tmp_path_factory.mktemp("gpu") / "small")


@pytest.fixture(scope="module")
def cpu_bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "cpu"
    export(str(checkpoint), out, ExportOptions("fp32", "cpu"))
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("precision", list(gpu_checks.TOLERANCES))
def test_the_cuda_runtime_is_right(precision: str, checkpoint: Path, cpu_bundle: Path, tmp_path: Path) -> None:
    export(str(checkpoint), tmp_path / "cuda", ExportOptions(precision, "cuda"))
    models = [gpu_checks.open_model(tmp_path / "cuda", "cuda", graphs=graphs) for graphs in (True, False)]
    cpu = gpu_checks.open_model(cpu_bundle, "cpu")
    findings = gpu_checks.check(models[0], models[1], cpu, gpu_checks.TOLERANCES[precision])
    assert [finding for finding in findings if not finding.ok] == []
    assert gpu_checks.attention_kernels(tmp_path / "cuda").ok


def test_the_checks_pass_for_equal_models_and_fail_for_others(cpu_bundle: Path, tmp_path: Path) -> None:
    model, same = (gpu_checks.open_model(cpu_bundle, "cpu") for _ in range(2))
    findings = gpu_checks.check(model, model, same, 1e-4)
    assert all(finding.ok for finding in findings)
    assert len(findings) == 7
    export(str(gpu_checks.small_checkpoint(tmp_path / "other", seed=1)), tmp_path / "bundle", ExportOptions("fp32", "cpu"))
    other = gpu_checks.open_model(tmp_path / "bundle", "cpu")
    failed = {finding.check for finding in gpu_checks.check(model, other, other, 1e-4) if not finding.ok}
    assert failed == {
        "tokens and logits against the reference",
        "bursts of CUDA graphs equal single runs without",
        "prompts of odd lengths",
    }


def test_the_kernel_that_decodes_is_read_from_the_debug_lines() -> None:
    line = "Operator=GroupQueryAttention Node=layers.0 SdpaKernel={}\n"
    assert gpu_checks._kernels(line.format("FLASH_ATTENTION") + 3 * line.format("XQA")) == (
        True,
        "{'FLASH_ATTENTION': 1, 'XQA': 3}",
    )
    assert not gpu_checks._kernels(line.format("FLASH_ATTENTION"))[0]
    assert gpu_checks._kernels("nothing") == (False, "no line says so: nothing")


def test_a_session_writes_what_it_has_when_parts_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    """Without a GPU every part fails, with a reason, and the table is printed all the same."""
    import json

    monkeypatch.setattr(gpu_session, "full_checkpoint", lambda work: (_ for _ in ()).throw(OSError("no room")))
    gpu_session.main([str(tmp_path / "work"), str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert [failure.split(":")[0] for failure in report["failures"]] == [
        "small_part",
        "full_checks",
        "full_times",
        "engine_times",
        "transformers_times",
    ]
    report["figures"] = {"ms to first token": 3.25, "ms vision": 1.0}
    gpu_session.note(report, "fp16", [gpu_checks.Finding("a check", False, "why")])
    text = gpu_session.table(report)
    assert "BAD fp16         a check" in text
    assert "3.250   target 4.0" in text
    assert "FAILED full_times: no room" in text


def test_the_median_leaves_out_the_first_calls() -> None:
    import time

    calls = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.05 if len(calls) <= 2 else 0.001)

    assert 1 <= gpu_session.median_ms(run, runs=5) < 40
    assert len(calls) == 7
