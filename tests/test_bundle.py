"""The manifest and the checks of a bundle: damage is named, nothing is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_bundle
from hypothesis import given
from hypothesis import strategies as st

import pgfast
from pgfast.bundle import Bundle, Manifest
from pgfast.errors import BundleError


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "pgfast.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_manifest_survives_a_round_trip(bundle: Path) -> None:
    text = (bundle / "pgfast.json").read_text()
    assert Manifest.from_json(text).to_json() == text


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json", "vision_encoder.onnx.data"])
def test_a_flipped_byte_is_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was changed"):
        pgfast.load(copy)


@pytest.mark.parametrize("name", ["decoder.onnx", "tokenizer.json", "pgfast.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        pgfast.load(copy)


def test_a_file_of_another_size_is_named(copy: Path) -> None:
    with (copy / "decoder.onnx.data").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data has \d+ bytes"):
        pgfast.load(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", "..", "a\\b"])
def test_a_path_out_of_the_folder_is_refused(copy: Path, name: str) -> None:
    edit(copy, lambda raw: raw["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(BundleError, match="not the name of a file inside"):
        pgfast.load(copy)


def test_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (copy / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match="leads out"):
        pgfast.load(copy)


def test_weights_outside_the_folder_are_not_read(copy: Path, tmp_path: Path) -> None:
    """The path to the weights is inside the ONNX file, out of the manifest's sight."""
    import onnx

    from pgfast.bundle import describe_file

    (tmp_path / "outside.data").write_bytes((copy / "decoder.onnx.data").read_bytes())
    model = onnx.load(copy / "decoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.data"
    onnx.save(model, copy / "decoder.onnx")
    entry = describe_file(copy / "decoder.onnx")
    edit(copy, lambda raw: raw["files"]["decoder.onnx"].update(sha256=entry.sha256, size=entry.size))
    with pytest.raises(BundleError, match=r"decoder\.onnx does not load"):
        pgfast.load(copy)


def test_a_newer_format_says_upgrade(copy: Path) -> None:
    edit(copy, lambda raw: raw.update(format_version=2, something="new"))
    with pytest.raises(BundleError, match="upgrade pgfast"):
        pgfast.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("image"), "image is missing"),
        (lambda raw: raw["dimensions"].pop("head_dim"), "dimensions.head_dim is missing"),
        (lambda raw: raw.update(surprise=1), "unknown key 'surprise'"),
        (lambda raw: raw["dimensions"].update(head_dim="16"), "head_dim is not a int"),
        (lambda raw: raw["dimensions"].update(head_dim=True), "head_dim is not a int"),
        (lambda raw: raw["dimensions"].update(head_dim=-1), "head_dim is -1"),
        (lambda raw: raw["image"].update(resampling="magic"), "resampling"),
        (lambda raw: raw["image"].update(std=[0.5, 0, 0.5]), "image section"),
        (lambda raw: raw["tokens"].update(eos=99999), "outside the vocabulary"),
        (lambda raw: raw["limits"].update(new_tokens=9999), "limits exceed"),
        (lambda raw: raw["prompts"].pop("answer"), "answer"),
        (lambda raw: raw["graphs"].pop("decoder"), "decoder"),
        (lambda raw: raw["files"].pop("tokenizer.json"), "tokenizer.json"),
        (lambda raw: raw.update(family="llava"), "family"),
        (lambda raw: raw.update(parity=[]), "parity"),
    ],
)
def test_a_manifest_that_makes_no_sense_says_where(copy: Path, change: Callable[[Any], object], message: str) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message) as caught:
        pgfast.load(copy)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_does_not_fit_its_graphs_is_refused(copy: Path) -> None:
    edit(copy, lambda raw: raw["graphs"]["decoder"]["outputs"].pop("next_token"))
    with pytest.raises(BundleError, match="next_token is not what the manifest says"):
        pgfast.load(copy)


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_any_text_gives_a_bundle_error(text: str) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


def test_not_a_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="pgfast export"):
        pgfast.load(tmp_path / "nowhere")


def test_large_files_are_hashed_on_request(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_bundle(checkpoint, tmp_path / "out")
    monkeypatch.setattr("pgfast.bundle.HASH_AT_LOAD", 1000)
    data = bytearray((folder / "decoder.onnx.data").read_bytes())
    data[0] ^= 1
    (folder / "decoder.onnx.data").write_bytes(data)
    Bundle.open(folder)
    with pytest.raises(BundleError, match="was changed"):
        Bundle.open(folder, full_check=True)
