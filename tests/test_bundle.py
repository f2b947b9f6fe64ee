"""The manifest and the checks of a bundle: damage is named, nothing is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_bundle
from hypothesis import given
from hypothesis import strategies as st

import pgfast
from pgfast.bundle import Bundle, describe_file
from pgfast.errors import BundleError
from pgfast.loading import demo_bundle
from pgfast.manifest import Manifest


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

    (tmp_path / "outside.data").write_bytes((copy / "decoder.onnx.data").read_bytes())
    model = onnx.load(copy / "decoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.data"
    onnx.save(model, copy / "decoder.onnx")
    entry = describe_file(copy / "decoder.onnx")
    edit(copy, lambda raw: raw["files"]["decoder.onnx"].update(sha256=entry.sha256, size=entry.size))
    with pytest.raises(BundleError, match=r"decoder\.onnx is not a graph .*outside\.data"):
        pgfast.load(copy)


def test_a_newer_format_says_upgrade(copy: Path) -> None:
    edit(copy, lambda raw: raw.update(format_version=4, something="new"))
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
        (lambda raw: raw["prompts"].update(answer="hello"), "{text}"),
        (lambda raw: raw["image"].update(mean=[float("nan")] * 3), "NaN"),
        (lambda raw: raw["image"].update(rescale_factor=float("inf")), "Infinity"),
        (lambda raw: raw["image"].update(rescale_factor=10**400), "JSON|float"),
        (lambda raw: raw["image"].update(std=[1e-300] * 3), "image section"),
        (lambda raw: raw["image"].update(size=4096), "pixel_values does not fit"),
        (lambda raw: raw["dimensions"].update(num_hidden_layers=3), "does not fit"),
        (lambda raw: raw["dimensions"].update(num_hidden_layers=1), "does not fit"),
        (lambda raw: raw["dimensions"].update(num_key_value_heads=4), "does not fit"),
        (lambda raw: raw["dimensions"].update(head_dim=2**23), "does not fit"),
        (lambda raw: raw["dimensions"].update(vocab_size=2000), "logits does not fit"),
        (lambda raw: raw["dimensions"].update(num_image_tokens=10), "does not fit"),
        (lambda raw: raw["dimensions"].update(hidden_size=64), "does not fit"),
        (lambda raw: raw.update(precision="fp16"), "does not fit precision fp16"),
        (lambda raw: raw.update(dialect="ort" if raw["dialect"] == "standard" else "standard"), "does not fit"),
        (lambda raw: raw["files"].update({"x" * 300: {"sha256": "0", "size": 1}}), "cannot be read|is missing"),
        (lambda raw: raw["files"].pop("decoder.onnx.data"), "'decoder.onnx.data' is not in the manifest"),
        (lambda raw: raw["graphs"].pop("decoder"), "decoder"),
        (lambda raw: raw["files"].pop("tokenizer.json"), "tokenizer.json"),
        (lambda raw: raw.update(family="llava"), "family"),
        (lambda raw: raw.update(parity=[]), "parity"),
        (lambda raw: raw.update(parity={"deep": [[[]]]}), "parity"),
        (lambda raw: raw.update(exporter="\ud800"), "half a character"),
        (lambda raw: raw["graphs"].update({"a\nb": 0}), r"graphs has the unusable key 'a\\nb'"),
        (lambda raw: raw["prompts"].update({"\ud800": ""}), r"prompts has the unusable key '\\ud800'"),
        (lambda raw: raw["prompts"].update({"x" * 5000: ""}), "prompts has the unusable key 'xxxx"),
        (lambda raw: raw["graphs"]["decoder"].update(file="a\nb"), r"files does not list 'a\\nb'"),
        (lambda raw: raw["graphs"]["decoder"]["inputs"].update({"a\nb": "int64[B]"}), "unusable key"),
    ],
)
def test_a_manifest_that_makes_no_sense_says_where(copy: Path, change: Callable[[Any], object], message: str) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message) as caught:
        pgfast.load(copy)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_does_not_fit_its_graphs_is_refused(copy: Path) -> None:
    edit(copy, lambda raw: raw["graphs"]["decoder"]["outputs"].pop("next_token"))
    with pytest.raises(BundleError, match="next_token does not fit the dimensions"):
        pgfast.load(copy)


@given(st.text())
def test_any_text_gives_a_bundle_error(text: str) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.just({})


@given(st.data())
def test_any_change_of_the_manifest_gives_a_manifest_or_a_bundle_error(data: st.DataObject) -> None:
    """One value anywhere in a valid manifest is replaced, removed, or joined by one of any name."""
    raw = json.loads((demo_bundle() / "pgfast.json").read_text())
    parent: Any = raw
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = data.draw(st.sampled_from(keys))
        child = parent[key]
        if not isinstance(child, dict | list) or not child or data.draw(st.booleans()):
            break
        parent = child
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "replace":
        parent[key] = data.draw(VALUES)
    elif action == "add" and isinstance(parent, dict):
        parent[data.draw(st.text(alphabet="a\n\r\x1b\u2028.\ud800") | st.text())] = data.draw(VALUES)
    else:
        del parent[key]
    try:
        manifest = Manifest.from_json(json.dumps(raw))
    except BundleError as error:
        message = str(error)
        assert message.isprintable()
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"]["vocab"].update({"zebra": 5000}), "ids outside"),
        (lambda raw: raw["model"]["vocab"].update({f"w{i}": 1300 + i for i in range(200)}), "do not belong together"),
        (lambda raw: raw["model"].update(unk_token="<gone>"), "not a usable tokenizer"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(copy: Path, change: Callable[[Any], object], message: str) -> None:
    path = copy / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    entry = describe_file(path)
    edit(copy, lambda raw: raw["files"]["tokenizer.json"].update(sha256=entry.sha256, size=entry.size))
    with pytest.raises(BundleError, match=message):
        pgfast.load(copy).answer(np.zeros((8, 8, 3), np.uint8), "is it a zebra \u4f60")


def test_saved_truncation_and_padding_of_the_tokenizer_are_ignored(copy: Path) -> None:
    from tokenizers import Tokenizer as RawTokenizer

    picture = np.zeros((8, 8, 3), np.uint8)
    wanted = pgfast.load(copy)._encode_prompt("what color is the shape?")
    tokenizer = RawTokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_to_multiple_of=8)
    tokenizer.save(str(copy / "tokenizer.json"))
    entry = describe_file(copy / "tokenizer.json")
    edit(copy, lambda raw: raw["files"]["tokenizer.json"].update(sha256=entry.sha256, size=entry.size))
    engine = pgfast.load(copy)
    assert engine._encode_prompt("what color is the shape?") == wanted
    assert engine.answer(picture, "what color is the shape?", options=pgfast.GenerateOptions(max_new_tokens=1)).token_ids
