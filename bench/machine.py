"""The machine: what it is, and how fast it can copy and multiply at the best."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pgfast.runtime.providers import import_onnxruntime

CPU_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "bf16",
    "i8mm",
)
"""What decides about matmul speed, as the kernel spells it."""
LIBRARIES = ("pgfast", "onnxruntime", "onnxruntime-gpu", "numpy", "torch", "transformers", "openvino", "tokenizers", "tensorrt")


SECONDS = 1.5
"""For each of the ceilings."""


def describe() -> dict[str, Any]:
    """Processor, memory, GPU, versions and commit."""
    info = cpuinfo()
    found = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in found],
        "memory_bytes": _meminfo("MemTotal"),
        "gpu": _first_line(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "commit": _commit(),
    }


def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; {} where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    return _meminfo("MemAvailable") or 8 * 2**30


def device_memory(pid: int) -> int | None:
    """Bytes of GPU memory that a process holds now, as the driver says."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        used = [int(line.split(",")[1]) * 2**20 for line in lines if line.split(",")[0].strip() == str(pid)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return sum(used) or None


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None


def _commit() -> str | None:
    """Commit of the source tree, marked when files differ from it; None in an installed package."""
    commit = _first_line(["git", "rev-parse", "HEAD"])
    return commit and commit + (" with changes" if _first_line(["git", "status", "--porcelain", "-uno"]) else "")


def ceilings(threads: int, provider: str = "cpu") -> dict[str, float]:
    """Measure the best this machine does, with as many threads as the contenders have, in a process of its own.

    Returns:
        `read_bytes` and `copy_bytes` per second of large arrays (a copy counts what it reads and writes), `fp32_flops` and
        `int8_flops` per second of a matmul, `fp16_flops` on a GPU; what cannot be measured here is missing.
    """
    command = [sys.executable, "-m", __name__, provider, str(threads), str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"the ceilings cannot be measured: {done.stderr.strip()[-300:]}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def cpu_ceilings(threads: int, seconds: float) -> dict[str, float]:
    """The processor's, as in `ceilings`."""
    return _memory_speed(threads, seconds) | _matmuls(threads, seconds)


def _memory_speed(threads: int, seconds: float) -> dict[str, float]:
    source = np.ones(2**27, np.float32)  # 0.5 GiB: beyond every cache
    parts = np.array_split(source, threads)
    targets = [np.empty_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter in both
        read = _best(lambda: list(pool.map(np.max, parts)), seconds)
        copy = _best(lambda: list(pool.map(np.copyto, targets, parts)), seconds)
    return {"read_bytes": source.nbytes / read, "copy_bytes": 2 * source.nbytes / copy}


def torch_ceilings(device: str, *, elements: int = 2**28, side: int = 8192, seconds: float) -> dict[str, float]:
    """A GPU's, as in `ceilings`: a copy of so many fp32 numbers and square fp32 and fp16 matmuls; {} without torch.

    Args:
        device: As torch calls it.
        elements: Of the copied array.
        side: Of the matrices.
        seconds: For each measurement.
    """
    try:
        import torch
    except ImportError:
        return {}
    wait: Callable[[], object] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)

    def timed(work: Callable[[], object]) -> float:
        return _best(lambda: (work(), wait()), seconds)

    copied = 8 * elements / timed(lambda: target.copy_(source))
    result = {"copy_bytes": copied, "read_bytes": copied}
    for name, dtype in (("fp32_flops", torch.float32), ("fp16_flops", torch.float16)):
        a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        result[name] = 2.0 * side**3 / timed(partial(torch.matmul, a, b))
    return result


def _matmuls(threads: int, seconds: float) -> dict[str, float]:
    """Matmuls of the prompt's shape in ONNX Runtime: fp32, and int8 activations with int8 weights."""
    try:
        from onnx import TensorProto, helper, numpy_helper

        onnxruntime = import_onnxruntime()
    except ImportError:
        return {}
    rows, inner, columns = 256, 2048, 8192
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    rng = np.random.default_rng(0)
    result = {}
    for name, operator, left, right, out in (
        ("fp32_flops", "MatMul", np.float32, np.float32, TensorProto.FLOAT),
        ("int8_flops", "MatMulInteger", np.uint8, np.int8, TensorProto.INT32),
    ):
        a = rng.integers(0, 100, (rows, inner)).astype(left)
        b = numpy_helper.from_array(rng.integers(-100, 100, (inner, columns)).astype(right), "b")
        graph = helper.make_graph(
            [helper.make_node(operator, ["a", "b"], ["y"])],
            "matmul",
            [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(np.dtype(left)), [rows, inner])],
            [helper.make_tensor_value_info("y", out, [rows, columns])],
            [b],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        result[name] = 2.0 * rows * inner * columns / _best(partial(session.run, None, {"a": a}), seconds)
    return result


def _best(work: Callable[[], object], seconds: float) -> float:
    """Shortest time of one run, after one uncounted."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    provider, threads, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    measured = cpu_ceilings(threads, seconds) if provider == "cpu" else torch_ceilings("cuda", seconds=seconds)
    sys.stdout.write(json.dumps(measured))
