"""Opening a graph: session options, the check against the manifest, and the tensors that are bound to it."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgfast.errors import BundleError, PgfastError, ProviderError
from pgfast.manifest import GraphSpec

from .providers import Shapes, Target, import_onnxruntime, rtx_devices

_NO_MEMORY = re.compile(
    r"bad_alloc|bad allocation|failed to allocate memory|out of memory|cannot allocate memory", re.IGNORECASE
)
"""In what ONNX Runtime, CUDA and the C++ library say."""
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()
"""All sessions of the process."""


def _keep_in_fork() -> None:
    """Let no session of the parent end in the child: it would wait for its threads, which the fork has not copied."""
    import ctypes

    for session in list(_OPEN):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


os.register_at_fork(after_in_child=_keep_in_fork)


def open_session(
    path: Path,
    spec: GraphSpec,
    target: Target,
    *,
    threads: int | None,
    shapes: Shapes | None = None,
    weights: Mapping[str, Any] | None = None,
) -> Any:
    """Open one graph on one provider.

    Args:
        path: The ONNX file.
        spec: What the manifest says its inputs and outputs are.
        target: The provider.
        threads: Threads of one operator on the CPU; None: one per core.
        shapes: Fixed input shapes, for providers that need them.
        weights: Initializers that are in memory already; they must outlive the session.

    Raises:
        BundleError: The graph does not load, or is not what the manifest says.
        ProviderError: The provider was dropped, so that the graph would run elsewhere.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = min(threads, 1024)
    if target.name == "cpu":
        # each session has threads of its own, and those of the one that has just run would spin on the other's cores
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if target.spin else "0")
    for name, value in (weights or {}).items():
        options.add_initializer(name, value)
    if target.static_shapes:
        target.cache_dir.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}.data")
    large = data.exists() and data.stat().st_size >= 2**31 - 2**20
    providers = target.ort_providers(shapes, _session_name(path, shapes), large=large)
    try:
        if target.name == "tensorrt-rtx":
            options.add_provider_for_devices([rtx_devices(ort)[target.device_id]], providers[0][1])
            session = ort.InferenceSession(str(path), options)
        else:
            # no fallback of its own: it prints to stdout and moves the work elsewhere
            session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except Exception as error:  # ONNX Runtime has a dozen exception types without a common root
        raise failure(f"{path.name} does not load", target, error) from error
    if providers[0][0] not in session.get_providers():
        raise ProviderError(f"{target.name} could not be started for {path.name}: 'pgfast doctor' says what is missing")
    _check_interface(path, spec, session)
    _OPEN.add(session)
    return session


def failure(what: str, target: Target, error: BaseException) -> PgfastError:
    """Turn what ONNX Runtime raised into one line: on the CPU the graph is to blame, elsewhere perhaps the device."""
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return out_of_memory(f"{what} on {target.name}", error)
    reason = " ".join(str(error).split())[:300]
    return (BundleError if target.name == "cpu" else ProviderError)(f"{what} on {target.name}: {reason}")


def out_of_memory(what: str, error: BaseException) -> ProviderError:
    """Say what there was no memory for, and what takes less."""
    reason = " ".join(str(error).split())[:200]
    return ProviderError(
        f"{what}: out of memory, fewer questions at once or a smaller bundle (int8, int4) need less ({reason})"
    )


def _session_name(path: Path, shapes: Shapes | None) -> str:
    return "_".join([path.stem, *("x".join(map(str, shape)) for shape in (shapes or {}).values())])[:100]


def _check_interface(path: Path, spec: GraphSpec, session: Any) -> None:
    """Compare names, types and shapes with the manifest."""
    for what, nodes, wanted in (("input", session.get_inputs(), spec.inputs), ("output", session.get_outputs(), spec.outputs)):
        found = {n.name: f"{_TYPES.get(n.type, n.type)}[{', '.join(str(dim) for dim in n.shape)}]" for n in nodes}
        if found != wanted:
            differing = sorted(set(found.items()) ^ set(wanted.items()))[0][0]
            raise BundleError(f"{path.name}: {what} {differing} is not what the manifest says")
