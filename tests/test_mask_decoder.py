"""The mask decoder's graph against two references, and the files that its weights come from."""

from __future__ import annotations

import dataclasses
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import DEMO_CHECKPOINT
from mask_weights import CONVOLUTIONS, UPSAMPLINGS, random_weights, save_weights
from pgfast.export import tensorrt_engines
from pgfast.export.build import export
from pgfast.export.cli import export as export_command
from pgfast.export.mask_decoder import read_weights
from pgfast.export.plan import ExportOptions

import pgfast
from pgfast.bundle import Bundle
from pgfast.errors import BundleError, ExportError, WeightMismatchError
from pgfast.loading import demo_bundle
from pgfast.manifest import Manifest

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return random_weights()


@pytest.fixture(scope="module")
def npz(weights: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("masks") / "masks.npz", weights)


@pytest.fixture(scope="module")
def bundle(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with a mask decoder, through the command line."""
    out = tmp_path_factory.mktemp("bundle") / "out"
    done = CliRunner().invoke(export_command, [str(DEMO_CHECKPOINT), str(out), "--mask-decoder", str(npz)])
    assert done.exit_code == 0, done.output
    return out


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, padding: int) -> np.ndarray:
    """[H, W, in] to [H', W', out], the kernel [k, k, in, out] not flipped."""
    size = weight.shape[0]
    padded = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    side = len(padded) - size + 1
    y = np.zeros((side, side, weight.shape[3])) + bias
    for row in range(size):
        for column in range(size):
            y += np.einsum("hwi,io->hwo", padded[row : row + side, column : column + side], weight[row, column])
    return y


def reference(weights: Tensors, codes: np.ndarray) -> np.ndarray:
    """The decoder as flax computes it, in float64: kernels come as [k, k, ...] and the input of an upsampling is spread out."""

    def kernel(name: str) -> np.ndarray:
        return weights[f"{name}.weight"].astype(np.float64).transpose(2, 3, 1, 0)

    def conv(name: str, x: np.ndarray) -> np.ndarray:
        return convolve(x, kernel(name), weights[f"{name}.bias"], CONVOLUTIONS[name][2] // 2)

    def upsample(name: str, x: np.ndarray) -> np.ndarray:
        spread = np.zeros((2 * len(x) - 1, 2 * len(x) - 1, x.shape[2]))
        spread[::2, ::2] = x
        flipped = kernel(name)[::-1, ::-1].transpose(0, 1, 3, 2)  # flax's transpose_kernel
        return convolve(spread, flipped, weights[f"{name}.bias"], 2)

    x = np.maximum(conv("decoder.0", weights["_vq_vae._embedding"][codes].reshape(4, 4, 512)), 0)
    for block in ("decoder.2.net", "decoder.3.net"):
        y = np.maximum(conv(f"{block}.0", x), 0)
        y = np.maximum(conv(f"{block}.2", y), 0)
        x = x + conv(f"{block}.4", y)
    for name in UPSAMPLINGS:
        x = np.maximum(upsample(name, x), 0)
    return conv("decoder.12", x)[..., 0]


def reference_of_torch(weights: Tensors, codes: np.ndarray) -> np.ndarray:
    """The same from torch's operators, which take the weights as they are stored."""
    functional, tensors = torch.nn.functional, {name: torch.from_numpy(value) for name, value in weights.items()}

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        padding = CONVOLUTIONS[name][2] // 2
        return functional.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=padding)

    x = tensors["_vq_vae._embedding"][torch.from_numpy(codes)].reshape(-1, 4, 4, 512).permute(0, 3, 1, 2)
    x = conv("decoder.0", x).relu()
    for block in ("decoder.2.net", "decoder.3.net"):
        x = x + conv(f"{block}.4", conv(f"{block}.2", conv(f"{block}.0", x).relu()).relu())
    for name in UPSAMPLINGS:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        x = functional.conv_transpose2d(x, weight, bias, stride=2, padding=1).relu()
    return conv("decoder.12", x)[:, 0].numpy()


def test_the_graph_computes_what_flax_and_torch_compute(bundle: Path, weights: Tensors) -> None:
    codes = np.random.default_rng(1).integers(0, 128, (3, 16))
    codes[0, :2] = 0, 127
    session = onnxruntime.InferenceSession(str(bundle / "mask_decoder.onnx"), providers=["CPUExecutionProvider"])
    (masks,) = session.run(["mask"], {"codes": codes})
    assert (masks.dtype, masks.shape) == (np.float32, (3, 64, 64))
    assert 0.2 < (masks > 0).mean() < 0.8  # both signs, or the comparison would show little
    np.testing.assert_allclose(masks, reference_of_torch(weights, codes), rtol=0, atol=2e-5 * np.abs(masks).max())
    for mask, row in zip(masks, codes, strict=True):
        np.testing.assert_allclose(mask, reference(weights, row), rtol=0, atol=2e-5 * np.abs(mask).max())
    (none,) = session.run(["mask"], {"codes": codes[:0]})
    assert none.shape == (0, 64, 64)


def test_the_bundle_lists_the_graph_and_still_answers(bundle: Path) -> None:
    manifest = Bundle.open(bundle, full_check=True).manifest
    spec = manifest.graphs["mask_decoder"]
    assert (spec.file, spec.inputs, spec.outputs) == (
        "mask_decoder.onnx",
        {"codes": "int64[N, 16]"},
        {"mask": "float32[N, 64, 64]"},
    )
    with pgfast.load(bundle, provider="cpu") as engine:
        picture = demo_bundle().parent / "blue_circle.png"
        assert engine.answer(picture, "what color is the shape?").text == "blue"


def test_the_manifest_refuses_another_interface(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    for change in ({"inputs": {"codes": "int64[N, 15]"}}, {"outputs": {"mask": "float32[N, 64, 63]"}}, {"outputs": {}}):
        spec = dataclasses.replace(manifest.graphs["mask_decoder"], **change)
        changed = dataclasses.replace(manifest, graphs=manifest.graphs | {"mask_decoder": spec})
        with pytest.raises(BundleError, match=r"mask_decoder\.onnx"):
            Manifest.from_json(changed.to_json())


def test_a_bundle_gets_a_mask_decoder_without_its_checkpoint(npz: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(export_command, [str(demo_bundle()), str(out), "--mask-decoder", str(npz)])
    assert done.exit_code == 0, done.output
    before, after = Bundle.open(demo_bundle()).manifest, Bundle.open(out, full_check=True).manifest
    assert after.files.keys() - before.files.keys() == {"mask_decoder.onnx"}
    assert after.files["mask_decoder.onnx"] == Bundle.open(bundle).manifest.files["mask_decoder.onnx"]
    assert before.to_json() == (demo_bundle() / "pgfast.json").read_text()
    # again, over the one that is there: the bundle it came from keeps its own
    other = save_weights(tmp_path / "other.npz", random_weights(7))
    export(str(out), tmp_path / "again", ExportOptions(mask_decoder=other))
    again = Bundle.open(tmp_path / "again", full_check=True).manifest
    assert again.files["mask_decoder.onnx"] != Bundle.open(out, full_check=True).manifest.files["mask_decoder.onnx"]


@pytest.mark.parametrize("options", [{}, {"precision": "int8", "mask_decoder": Path("masks.npz")}])
def test_nothing_else_is_done_to_a_bundle(options: dict[str, object], npz: Path, tmp_path: Path) -> None:
    if "mask_decoder" in options:
        options = options | {"mask_decoder": npz}
    with pytest.raises(ExportError, match="is a bundle already: --mask-decoder alone"):
        export(str(demo_bundle()), tmp_path / "out", ExportOptions(**options))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_transformersjs_takes_no_mask_decoder(npz: Path, tmp_path: Path) -> None:
    args = [str(DEMO_CHECKPOINT), str(tmp_path / "out"), "--layout", "transformers.js", "--mask-decoder", str(npz)]
    done = CliRunner().invoke(export_command, args)
    assert done.exit_code == 2
    assert "takes only --precision and --adapter" in done.output


def refused(path: Path, kind: type[ExportError], message: str) -> str:
    """The export says what is wrong in one line and leaves nothing behind."""
    out = path.parent / "never"
    with pytest.raises(kind, match=message) as caught:
        export(str(DEMO_CHECKPOINT), out, ExportOptions(mask_decoder=path))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def test_what_does_not_fit_is_named(weights: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "masks.npz"
    changes: list[tuple[Tensors, list[str], str]] = [
        ({}, ["decoder.4.bias"], r"missing: decoder\.4\.bias"),
        ({"decoder.14.weight": np.zeros(3, np.float32)}, [], r"unexpected: decoder\.14\.weight"),
        ({"decoder.6.weight": weights["decoder.6.weight"].swapaxes(0, 1)}, [], r"6\.weight has shape \[64, 128, 4, 4\] where"),
        ({"decoder.12.bias": np.array([np.nan], np.float32)}, [], r"decoder\.12\.bias holds NaN or infinite values"),
        ({"decoder.12.bias": np.array([1e300])}, [], r"decoder\.12\.bias holds NaN or infinite values"),
        ({"decoder.12.bias": np.array([1])}, [], r"decoder\.12\.bias has type int64"),
        ({"decoder.12.bias": np.array([1 + 1j])}, [], r"decoder\.12\.bias has type complex128"),
        ({"decoder.12.bias": np.zeros(5000)}, [], r"decoder\.12\.bias has 40,128 bytes where shape \[1\]"),
    ]
    for extra, missing, message in changes:
        tensors = {name: value for name, value in (weights | extra).items() if name not in missing}
        refused(save_weights(path, tensors), WeightMismatchError, message)
    both = {name: value for name, value in weights.items() if name != "decoder.4.bias"} | {"surprise": np.zeros(1)}
    refused(save_weights(path, both), WeightMismatchError, r"missing: decoder\.4\.bias; unexpected: surprise")


def test_the_published_file_may_hold_the_encoder_and_other_floats(weights: Tensors, tmp_path: Path) -> None:
    rest = {
        **{
            f"encoder.{name}.{part}": np.zeros(2)
            for name in ("0", "6", "10", "8.net.0", "9.net.4")
            for part in ("weight", "bias")
        },
        "_vq_vae._ema_cluster_size": np.zeros(128),
        "_vq_vae._ema_w": np.zeros((128, 512)),
    }
    changed = {name: np.asfortranarray(value.astype(">f8" if "4" in name else np.float16)) for name, value in weights.items()}
    read = read_weights(save_weights(tmp_path / "whole.npz", changed | rest))
    assert read.keys() == weights.keys()
    for name, value in read.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, changed[name].astype(np.float32))


def test_a_compressed_file_is_read_as_well(weights: Tensors, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "masks.npz", **weights)  # type: ignore[arg-type]
    read = read_weights(tmp_path / "masks.npz")
    assert all((read[name] == value).all() for name, value in weights.items())


def test_pickles_are_not_read(weights: Tensors, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "masks.npz"
    np.savez(path, **(weights | {"decoder.12.bias": np.array([Trap()], object)}))  # type: ignore[arg-type]
    refused(path, WeightMismatchError, r"decoder\.12\.bias has type object")
    assert not (tmp_path / "trapped").exists()


def rewritten(path: Path, name: str, content: bytes, weights: Tensors) -> Path:
    """The weights in a file, one member of it with other bytes, compressed."""
    plain = save_weights(path.with_name("plain.npz"), weights)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for entry in old.namelist():
            new.writestr(entry, content if entry == f"{name}.npy" else old.read(entry))
    return path


def test_bombs_are_refused_before_they_are_unpacked(weights: Tensors, tmp_path: Path) -> None:
    bomb = rewritten(tmp_path / "masks.npz", "decoder.12.bias", bytes(200 * 2**20), weights)
    assert bomb.stat().st_size < 20 * 2**20
    refused(bomb, WeightMismatchError, r"decoder\.12\.bias has 209,715,200 bytes")
    # the same with a size that lies: no more than that is unpacked, and the checksum does not fit
    raw = bytearray(bomb.read_bytes())
    for place in [match.start() for match in re.finditer(re.escape((200 * 2**20).to_bytes(4, "little")), raw)]:
        raw[place : place + 4] = (132).to_bytes(4, "little")
    bomb.write_bytes(raw)
    refused(bomb, ExportError, "is not a .npz file, or is damaged")
    # a header that promises more than there is
    header = str({"descr": "<f4", "fortran_order": False, "shape": (2**60,)}).ljust(117) + "\n"
    lie = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(4)
    refused(rewritten(tmp_path / "masks.npz", "decoder.12.bias", lie, weights), WeightMismatchError, "has shape")
    nested = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000
    refused(rewritten(tmp_path / "masks.npz", "decoder.0.bias", nested, weights), ExportError, "damaged")


def test_files_that_are_no_npz(npz: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing.npz", ExportError, r"nothing\.npz does not exist: --mask-decoder takes")
    refused(tmp_path, ExportError, "cannot be read: Is a directory")
    (tmp_path / "text.npz").write_text("not a zip")
    refused(tmp_path / "text.npz", ExportError, r"text\.npz is not a \.npz file")
    whole = npz.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        refused(tmp_path / "cut.npz", ExportError, r"cut\.npz is not a \.npz file, or is damaged")
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    (tmp_path / "broken.npz").write_bytes(broken)
    refused(tmp_path / "broken.npz", ExportError, r"damaged: Bad CRC-32")


def test_a_tensor_that_comes_twice_is_refused(npz: Path, tmp_path: Path) -> None:
    path = tmp_path / "twice.npz"
    path.write_bytes(npz.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("decoder.4.bias", b"")  # without the suffix: another member, the same tensor
    refused(path, WeightMismatchError, r"holds decoder\.4\.bias a second time")


def test_no_engine_is_built_of_it(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export(str(DEMO_CHECKPOINT), out, ExportOptions(target="tensorrt", mask_decoder=npz))
    asked = []

    def build(manifest: Manifest, folder: Path, graph: str, capability: str, to: Path) -> None:
        asked.append(graph)
        if len(asked) == 2:
            raise ExportError("enough")

    monkeypatch.setattr(tensorrt_engines, "build_engine", build)
    with pytest.raises(ExportError, match="enough"):
        tensorrt_engines.refresh_engines(out, ["8.9"])
    assert asked == ["decoder", "vision_encoder"]
