"""Advice for every kind of broken installation."""

from __future__ import annotations

import pytest

from pgfast.cli import doctor


def advise(cpu: str | None, gpu: str | None, gpus: list[str], cuda: str = "works") -> list[str]:
    return doctor.advise({"onnxruntime": cpu, "onnxruntime-gpu": gpu}, gpus, {"cuda": cuda})


def test_a_healthy_installation_gets_no_advice() -> None:
    assert advise("1.32.0", None, []) == []
    assert advise(None, "1.32.0", ["H200"]) == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (("1.32.0", "1.32.0", []), "overwrite each other"),
        ((None, None, []), "onnxruntime is missing"),
        (("1.32.0", None, ["H200"]), "has no CUDA"),
        ((None, "1.32.0", ["H200"], "provider cuda needs libcublas.so.13"), "libcublas"),
    ],
)
def test_each_problem_gets_one_line(found: tuple[str | None, str | None, list[str]], message: str) -> None:
    lines = advise(*found)
    assert len(lines) == 1
    assert message in lines[0]


def test_without_onnxruntime_every_provider_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'pgfast[cpu]'" in doctor._try_provider("cpu")
