"""From the user's word for a device to ONNX Runtime's providers and options.

Nothing here needs the hardware: options are plain dictionaries, and what is missing is named before a session is tried.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgfast.errors import MissingDependencyError, ProviderError

logger = logging.getLogger(__name__)

PROVIDERS = ("auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx")
_ORT_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
RTX_MODULE, RTX_NAME = "onnxruntime_ep_nv_tensorrt_rtx", "NvTensorRTRTXExecutionProvider"
_INSTALL = {
    "cpu": "pip install 'pgfast[cpu]'",
    "cuda": "pip install 'pgfast[gpu]'",
    "tensorrt": "pip install 'pgfast[tensorrt]'",
    "tensorrt-rtx": "pip install 'pgfast[tensorrt-rtx]'",
}
_CUDA_LIBRARIES = ("libcuda.so.1", "libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")
_TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvonnxparser.so.10")
BUNDLE_CACHE = ".tensorrt"
"""Folder inside a bundle; the manifest does not cover it."""
Shapes = Mapping[str, Sequence[int]]
"""Graph input to its fixed shape."""


@dataclass(frozen=True, slots=True)
class Target:
    """One provider, ready to open sessions with."""

    name: str
    """The user's word: cpu, cuda, tensorrt or tensorrt-rtx."""
    device_id: int = 0
    fp16: bool = False
    bf16: bool = False
    cache_dir: Path = field(default_factory=lambda: default_cache_dir())
    """Where TensorRT keeps built engines."""
    spin: bool = True
    """Whether threads on the CPU wait for each other at full speed."""
    cuda_graph: bool = False
    """Whether the CUDA provider may capture runs. Every run then says which graph it is, or that it is none."""

    @property
    def static_shapes(self) -> bool:
        """Whether each input shape needs a session of its own (TensorRT uses optimization profile 0 only)."""
        return self.name in ("tensorrt", "tensorrt-rtx")

    @property
    def device(self) -> str:
        """ONNX Runtime's name of the memory that tensors live in."""
        # the RTX plugin comes with the CPU build of onnxruntime, which cannot allocate on a GPU: it copies
        return "cuda" if self.name in ("cuda", "tensorrt") else "cpu"

    def ort_providers(
        self, shapes: Shapes | None = None, prefix: str = "", *, large: bool = False
    ) -> list[tuple[str, dict[str, str]]]:
        """Return provider names and options in ONNX Runtime's order of preference.

        Args:
            shapes: Input shapes of the session, for the providers with `static_shapes`.
            prefix: Name of the session, unique per shape: ONNX Runtime would reuse an engine of another shape (#32254).
            large: Whether the weights do not fit into one protobuf message.
        """
        if self.name == "cpu":
            return [("CPUExecutionProvider", {})]
        if self.name == "tensorrt-rtx":
            return [(RTX_NAME, self.rtx_options(shapes or {}))]
        cuda = ("CUDAExecutionProvider", self.cuda_options())
        if self.name == "cuda":
            return [cuda, ("CPUExecutionProvider", {})]
        tensorrt = self.tensorrt_options(shapes or {}, prefix)
        if large:  # handed over one by one; else the provider writes the graph and all of them into one message
            tensorrt["trt_load_user_initializer"] = "1"
        return [("TensorrtExecutionProvider", tensorrt), cuda, ("CPUExecutionProvider", {})]

    def cuda_options(self) -> dict[str, str]:
        """Options of the CUDA provider; TF32 is off because answers must be those of the checkpoint."""
        options = {"device_id": str(self.device_id), "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
        return options | {"enable_cuda_graph": "1"} if self.cuda_graph else options

    def tensorrt_options(self, shapes: Shapes, prefix: str) -> dict[str, str]:
        """Options of the TensorRT provider: fixed shapes, engines kept on disk, fp32 where norms need it."""
        profile = _profile(shapes)
        return {
            "device_id": str(self.device_id),
            # the provider builds weakly typed networks: without these a graph of 16 bits runs in fp32
            "trt_fp16_enable": str(int(self.fp16)),
            "trt_bf16_enable": str(int(self.bf16)),
            "trt_layer_norm_fp32_fallback": "1",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(self.cache_dir),
            "trt_engine_cache_prefix": prefix,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(self.cache_dir),
            "trt_profile_min_shapes": profile,
            "trt_profile_opt_shapes": profile,
            "trt_profile_max_shapes": profile,
        }

    def rtx_options(self, shapes: Shapes) -> dict[str, str]:
        """Options of the TensorRT-RTX plugin provider."""
        profile = _profile(shapes)
        return {
            "nv_profile_min_shapes": profile,
            "nv_profile_opt_shapes": profile,
            "nv_profile_max_shapes": profile,
            "nv_runtime_cache_path": str(self.cache_dir),
        }


def _profile(shapes: Shapes) -> str:
    """TensorRT's notation: `name:1x2x3,other:4`."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def default_cache_dir() -> Path:
    """Folder for built engines, by the XDG rule."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgfast"


def engine_cache(name: str, bundle: Path, digest: str) -> Path:
    """Folder for what a provider builds for a bundle.

    Args:
        name: The provider. TensorRT's engines stay beside the bundle where that can be written, and travel with it.
        bundle: The bundle's folder.
        digest: The bundle's; onnxruntime names engines after the graph alone, not its weights.
    """
    beside = bundle / BUNDLE_CACHE
    real = beside.is_dir() and not beside.is_symlink()
    usable = real or not os.path.lexists(beside)
    if name == "tensorrt" and usable and os.access(beside if real else bundle, os.W_OK | os.X_OK):
        return beside / digest[:16]
    return default_cache_dir() / digest[:16]


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        MissingDependencyError: Neither of its packages is installed.
    """
    # since 1.29 it reports sessions and models to Microsoft, unless this is there before it is imported
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "cpu") from error
    return onnxruntime


def candidates(provider: str, dialect: str) -> list[str]:
    """Return the providers to try, best first.

    Args:
        provider: The user's word.
        dialect: The bundle's dialect; TensorRT reads only the standard one.

    Raises:
        ProviderError: The word is unknown, or the bundle was exported for other providers.
    """
    if provider not in PROVIDERS:
        raise ProviderError(f"unknown provider {provider!r}: choose one of {', '.join(PROVIDERS)}")
    if provider == "auto":
        return ["tensorrt", "tensorrt-rtx", "cuda", "cpu"] if dialect == "standard" else ["cuda", "cpu"]
    if provider.startswith("tensorrt") and dialect != "standard":
        raise ProviderError(f"{provider} cannot read this bundle's operators: export it with --target {provider}")
    return [provider]


def check_available(name: str) -> None:
    """Make sure a provider can be tried: its package is installed and its libraries load.

    Raises:
        ProviderError: The message names the first missing piece and how to get it.
    """
    ort = import_onnxruntime()
    if name == "tensorrt-rtx":
        _check_rtx(ort)
        return
    available = ort.get_available_providers()
    if _ORT_NAMES[name] not in available:
        raise ProviderError(
            f"provider {name} is not in the installed onnxruntime (it has {', '.join(available)}): {_INSTALL[name]}"
        )
    if name == "cpu":
        return
    preload(ort, tensorrt=name == "tensorrt")
    wanted = _CUDA_LIBRARIES + (_TENSORRT_LIBRARIES if name == "tensorrt" else ())
    if missing := first_missing(wanted):
        driver = "install the NVIDIA driver" if missing == "libcuda.so.1" else _INSTALL[name]
        raise ProviderError(f"provider {name} needs {missing}, which cannot be loaded: {driver}")


def _check_rtx(ort: Any) -> None:
    if importlib.util.find_spec(RTX_MODULE) is None:
        raise ProviderError(f"provider tensorrt-rtx needs its plugin package: {_INSTALL['tensorrt-rtx']}")
    if missing := first_missing(("libcuda.so.1",)):
        raise ProviderError(f"provider tensorrt-rtx needs {missing}, which cannot be loaded: install the NVIDIA driver")
    register_rtx(ort)
    if not rtx_devices(ort):
        raise ProviderError("provider tensorrt-rtx found no GPU it supports (compute capability 8.6, 8.9, or 12.0 and up)")


def register_rtx(ort: Any) -> None:
    """Register the plugin provider with ONNX Runtime, once."""
    if rtx_devices(ort):
        return
    plugin = importlib.import_module(RTX_MODULE)
    ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())


def rtx_devices(ort: Any) -> list[Any]:
    """Return the GPUs that the plugin provider can use."""
    return [device for device in ort.get_ep_devices() if device.ep_name == RTX_NAME]


def preload(ort: Any, *, tensorrt: bool) -> list[str]:
    """Load the libraries that pip installed, so that no LD_LIBRARY_PATH is needed.

    Returns:
        Paths of the TensorRT libraries that were loaded.
    """
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return load_libraries(library_folder("tensorrt_libs"), _TENSORRT_LIBRARIES) if tensorrt else []


def library_folder(package: str) -> Path | None:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def load_libraries(folder: Path | None, names: Sequence[str]) -> list[str]:
    """Load those of `names` that are in `folder` for the whole process; returns their paths."""
    loaded = []
    for name in names:
        path = folder / name if folder else None
        if path is None or not path.exists():
            continue
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            logger.warning("%s does not load: %s", path, error)
            continue
        loaded.append(str(path))
    return loaded


def first_missing(names: Sequence[str]) -> str | None:
    """Return the first library that the loader cannot find, or None."""
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            return name
    return None
