"""`pgfast doctor`: what is installed, which providers really work, and what to do about those that do not."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass

import click

from pgfast.errors import PgfastError

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers", "pillow", "tensorrt-cu13", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Report:
    """What `doctor` found."""

    pgfast: str
    python: str
    platform: str
    packages: dict[str, str | None]
    gpus: list[str]
    providers: dict[str, str]
    """Provider to "works", or the reason why not."""
    advice: list[str]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(as_json: bool) -> int:
    """Check this installation; exits with 1 if the demo model cannot answer here."""
    report = examine()
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print(f"pgfast {report.pgfast}, Python {report.python}, {report.platform}")
        for name, version in report.packages.items():
            print(f"  {name:18}{version or '-'}")
        print(f"GPU: {', '.join(report.gpus) or 'none found'}")
        for name, state in report.providers.items():
            print(f"  {name:14}{state}")
        for line in report.advice:
            print(f"advice: {line}")
    return 0 if "works" in report.providers.values() else 1


def examine() -> Report:
    """Collect the report; every provider is tried with a real session."""
    import pgfast

    packages = {name: _version(name) for name in _PACKAGES}
    providers = {name: _try_provider(name) for name in ("cpu", "cuda", "tensorrt", "tensorrt-rtx")}
    gpus = list_gpus()
    return Report(
        pgfast=pgfast.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=packages,
        gpus=gpus,
        providers=providers,
        advice=advise(packages, gpus, providers),
    )


def advise(packages: dict[str, str | None], gpus: list[str], providers: dict[str, str]) -> list[str]:
    """Return one line per problem."""
    lines = []
    cpu, gpu = packages["onnxruntime"], packages["onnxruntime-gpu"]
    if cpu and gpu:
        lines.append(
            "onnxruntime and onnxruntime-gpu overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'pgfast[gpu]'"
        )
    elif not cpu and not gpu:
        lines.append("onnxruntime is missing: pip install 'pgfast[cpu]' (or 'pgfast[gpu]')")
    elif gpus and not gpu:
        lines.append("there is a GPU but onnxruntime has no CUDA: pip uninstall -y onnxruntime && pip install 'pgfast[gpu]'")
    elif gpus and providers["cuda"] != "works":
        lines.append(f"the GPU cannot be used: {providers['cuda']}")
    return lines


def list_gpus() -> list[str]:
    """Ask the NVIDIA driver for device names, without any CUDA package."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(128)
        if cuda.cuDeviceGetName(name, len(name), index) == 0:
            names.append(name.value.decode(errors="replace"))
    return names


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try_provider(name: str) -> str:
    """Open the embedded vision encoder on a provider and run it; both dialects share that graph."""
    from pgfast.bundle import Bundle
    from pgfast.loading import demo_bundle
    from pgfast.runtime.providers import Target, check_available
    from pgfast.runtime.session import open_session

    try:
        check_available(name)
        bundle = Bundle.open(demo_bundle())
        spec = bundle.manifest.graphs["vision_encoder"]
        size = bundle.manifest.image.size
        shapes = {"pixel_values": (1, 3, size, size)}
        session = open_session(bundle.path(spec.file), spec, Target(name), threads=1, shapes=shapes)
        import numpy as np

        session.run(None, {"pixel_values": np.zeros(shapes["pixel_values"], np.float32)})
    except PgfastError as error:
        return str(error)
    return "works"
