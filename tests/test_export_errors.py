"""Checkpoints that cannot be exported: one clear line, and nothing is left behind."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shape, make_checkpoint
from pgfast.export import build
from pgfast.export.build import export
from pgfast.export.plan import ExportOptions
from safetensors.numpy import load_file, save_file

import pgfast
from pgfast.errors import BundleError, ExportError, InputError, MissingDependencyError, PgfastError, WeightMismatchError

Tensors = dict[str, np.ndarray]


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def refused(folder: Path, kind: type[PgfastError], message: str, **options: Any) -> None:
    """The export raises, in one line, and leaves neither the folder nor a temporary one."""
    out = folder.parent / "out"
    with pytest.raises(kind, match=message) as caught:
        export(str(folder), out, ExportOptions(**options))
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


NORM = "language_model.model.norm.weight"


def test_missing_extra_and_misshaped_tensors_are_named(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.pop(NORM))
    refused(copy, WeightMismatchError, r"missing: language_model\.norm\.weight")
    edit_weights(copy, lambda tensors: tensors.update({NORM: np.zeros(3, np.float32)}))
    refused(copy, WeightMismatchError, r"norm\.weight has shape \[3\] where config\.json asks for \[48\]")
    edit_weights(copy, lambda tensors: tensors.update({NORM: np.zeros(48, np.float32), "surprise": np.zeros(1, np.float32)}))
    refused(copy, WeightMismatchError, "unexpected: surprise")


def test_all_problems_come_in_one_message(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.update({"surprise": tensors.pop(NORM)}))
    refused(copy, WeightMismatchError, r"missing: .*norm.*unexpected: surprise")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(model_type="llava"), "not a PaliGemma checkpoint: .*'llava'"),
        (lambda raw: raw["text_config"].update(model_type="gemma3"), "gemma3"),
        (lambda raw: raw["text_config"].update(sliding_window=64), "sliding_window"),
        (lambda raw: raw["text_config"].update(attention_bias=True), "attention_bias"),
        (lambda raw: raw["text_config"].update(hidden_activation="relu"), "relu"),
        (lambda raw: raw["text_config"].update(rope_parameters={"rope_type": "yarn"}), "yarn"),
        (lambda raw: raw["vision_config"].update(patch_size=7), "multiple of patch_size"),
        (lambda raw: raw["vision_config"].update(hidden_size="many"), "hidden_size is 'many'"),
        (lambda raw: raw["text_config"].update(num_key_value_heads=3), "num_key_value_heads"),
        (lambda raw: raw.update(text_config=[1]), "must be objects"),
    ],
)
def test_configs_of_other_functions_are_refused(copy: Path, change: Callable[[Any], object], message: str) -> None:
    edit_json(copy / "config.json", change)
    refused(copy, ExportError, message)


def test_incomplete_folders_say_what_is_missing(copy: Path, tmp_path: Path) -> None:
    for name, message in (
        ("tokenizer.json", "no tokenizer.json"),
        ("preprocessor_config.json", "no preprocessor_config.json"),
        ("model.safetensors", "no safetensors"),
        ("config.json", "no config.json"),
    ):
        (copy / name).rename(tmp_path.parent / name)
        refused(copy, ExportError, message)
        (tmp_path.parent / name).rename(copy / name)


def test_damaged_safetensors_are_named(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    refused(copy, ExportError, r"model\.safetensors is damaged")


def test_another_preprocessing_is_refused(copy: Path) -> None:
    edit_json(copy / "preprocessor_config.json", lambda raw: raw.update(do_normalize=False))
    refused(copy, ExportError, "do_normalize")
    edit_json(copy / "preprocessor_config.json", lambda raw: raw.update(do_normalize=True, resample=1))
    refused(copy, ExportError, "resample 1")
    edit_json(copy / "preprocessor_config.json", lambda raw: raw.update(resample=3, size={"height": 99, "width": 99}))
    refused(copy, ExportError, "99")


def test_an_existing_folder_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match="exists"):
        export(str(checkpoint), tmp_path, ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/at-all", "a/b/c", "/absolute/nowhere"])
def test_a_name_that_is_no_checkpoint_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither a folder nor a Hub id"):
        export(name, tmp_path / "out", ExportOptions())


def test_a_hub_id_that_cannot_be_downloaded_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match=r"cannot be downloaded .*hf download google/"):
        export("google/paligemma-3b-ft-vqav2-224", tmp_path / "out", ExportOptions())


def test_a_hub_id_is_downloaded_and_its_commit_recorded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client is replaced by one that hands out a local snapshot, as it lies in its cache."""
    snapshot = Path(shutil.copytree(checkpoint, tmp_path / "snapshots" / "0123abc"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, allow_patterns: str(snapshot))
    manifest = export("someone/paligemma", tmp_path / "out", ExportOptions())
    assert (manifest.source.checkpoint, manifest.source.revision) == ("someone/paligemma", "0123abc")


def test_a_full_disk_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_weights", full)
    refused(copy, ExportError, "disk .* is full")


def test_a_folder_that_may_not_be_written_says_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    refused(copy, ExportError, "cannot be created: Permission denied")


def test_an_interrupted_export_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(str(copy), copy.parent / "out", ExportOptions(), interrupt)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_killed_export_leaves_nothing_that_loads(copy: Path) -> None:
    """kill -9 in the middle of the weights."""
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pgfast.export.build import export\n"
        "from pgfast.export.plan import ExportOptions\n"
        "def kill(done, total):\n    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export(sys.argv[1], Path(sys.argv[2]), ExportOptions(), kill)"
    )
    out = copy.parent / "out"
    done = subprocess.run([sys.executable, "-c", script, str(copy), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    (partial,) = (path for path in copy.parent.iterdir() if path != copy)
    assert partial.name.startswith(".out.partial-")
    with pytest.raises(BundleError, match="interrupted"):
        pgfast.load(partial)
    export(str(copy), out, ExportOptions())  # and the next one is not in its way
    assert pgfast.load(out).provider == "cpu"


def test_weights_beyond_fp16_are_refused(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors[NORM].__setitem__(0, 1e6))
    refused(copy, ExportError, "fp16's range", precision="fp16")


@pytest.mark.parametrize("options", [{"precision": "fp12"}, {"target": "tpu"}])
def test_unknown_options_are_refused(copy: Path, options: dict[str, str]) -> None:
    refused(copy, ExportError, "choose one of", **options)


def test_templates_are_refused(copy: Path) -> None:
    """One without a place for the question, and one that contradicts what the checkpoint was trained with."""
    refused(copy, InputError, "answer template", answer_template="answer en")
    (copy / "pgfast_prompts.json").write_text('{"answer": "answer {text}"}')
    refused(copy, InputError, "leave --answer-template out", answer_template="answer {language} {text}")


def test_nan_in_weights_names_the_tensor(copy: Path) -> None:
    for value in (np.nan, np.inf):
        edit_weights(copy, lambda tensors, value=value: tensors[NORM].__setitem__(0, value))
        refused(copy, ExportError, rf"{NORM} .*NaN or infinite")


def test_other_types_of_weights_are_refused(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.update({NORM: tensors[NORM].astype(np.int8)}))
    refused(copy, ExportError, rf"{NORM} in model\.safetensors has type I8")


def test_half_a_shard_and_a_missing_shard_are_named(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(copy, ExportError, r"model\.safetensors is damaged or incomplete")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, ExportError, r"model-00001-of-00002\.safetensors is missing")


def test_an_index_of_another_form_is_refused(copy: Path) -> None:
    for index in ({"weight_map": {"a": 5}}, {"weight_map": []}, [], {}):
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(copy, ExportError, "5 is missing|cannot be read|no tensors|missing")


def test_words_are_checked_before_anything_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgfast.export.plan.locate", None)
    with pytest.raises(ExportError, match="int3 does not fit"):
        export("someone/paligemma", tmp_path / "out", ExportOptions("int3"))


def test_folders_made_for_a_failed_export_go_with_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(build, "write_weights", fail)
    with pytest.raises(ExportError, match="Input/output error"):
        export(str(copy), copy.parent / "a" / "b" / "out", ExportOptions())
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_pickle_checkpoint_comes_with_the_command_that_converts_it(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, ExportError, r"pytorch_model\.bin is a pickle.*save_pretrained")


def test_a_disk_that_is_too_small_is_refused_before_any_work(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(build, "_write_files", None)
    refused(copy, ExportError, "GB free, the bundle needs")


def test_a_tokenizer_that_does_not_fit_is_refused(copy: Path) -> None:
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text("{}")
    refused(copy, ExportError, "tokenizer cannot be used")
    raw = json.loads(text)
    raw["model"]["vocab"] |= {f"w{i}": 1300 + i for i in range(200)}
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    refused(copy, ExportError, "do not belong together")


def test_a_sliding_window_shorter_than_an_answer_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", Shape(gemma2=True))
    edit_json(folder / "config.json", lambda raw: raw["text_config"].update(sliding_window=8))
    refused(folder, ExportError, "sliding_window 8")


WRONG_KIND = (
    r"resample|image_mean|gemma|max_position|rope_param|tie_word|bos_token_id|token id|head_dim|num_channels|image section"
)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("preprocessor_config.json", lambda raw: raw.update(resample=[3])),
        ("preprocessor_config.json", lambda raw: raw.update(image_mean="123")),
        ("preprocessor_config.json", lambda raw: raw.update(image_mean=[float("nan")] * 3)),
        ("config.json", lambda raw: raw["text_config"].update(model_type=["gemma"])),
        ("config.json", lambda raw: raw["text_config"].update(max_position_embeddings=10**12)),
        ("config.json", lambda raw: raw["text_config"].update(rope_parameters=[1])),
        ("config.json", lambda raw: raw.update(tie_word_embeddings="false")),
        ("config.json", lambda raw: raw.update(bos_token_id=True)),
        ("config.json", lambda raw: raw.update(eos_token_id=-1)),
        ("config.json", lambda raw: raw["text_config"].update(num_hidden_layers=16_000_000)),
        ("config.json", lambda raw: raw["text_config"].update(head_dim=4_000_000)),
        ("config.json", lambda raw: raw["text_config"].update(head_dim=15)),
        ("config.json", lambda raw: raw["vision_config"].update(num_channels=1)),
        ("preprocessor_config.json", lambda raw: raw.update(image_std=[0, 0, 0])),
    ],
)
def test_values_of_the_wrong_kind_are_refused(copy: Path, file: str, change: Callable[[Any], object]) -> None:
    edit_json(copy / file, change)
    refused(copy, ExportError, WRONG_KIND)


def test_files_that_are_no_json_objects_are_refused(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text("[1]")
    refused(copy, ExportError, "preprocessor_config")
    (copy / "config.json").write_text("[" * 200_000)
    refused(copy, ExportError, "config.json")


@pytest.mark.parametrize("name", ["~nobodyxyz/x", "x" * 300, "a\0b"])
def test_names_that_the_system_refuses_are_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        export(name, tmp_path / "out", ExportOptions())
    if "\0" not in name and "/" not in name:
        with pytest.raises(ExportError):
            export(str(checkpoint), tmp_path / name / "out" / name, ExportOptions())


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_verification_without_its_libraries_is_refused_first(copy: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    monkeypatch.setattr(build, "_write_files", None)
    refused(copy, MissingDependencyError, rf"{module} is not installed: pip install 'pgfast\[verify\]'", verify=True)


def test_verification_fails_when_logits_are_not_finite(copy: Path) -> None:
    edit_weights(
        copy, lambda tensors: tensors.update({k: v * 300 for k, v in tensors.items() if "mlp" in k or "embed_tokens" in k})
    )
    refused(copy, ExportError, "not finite|differs", precision="fp16", verify=True)


def test_verification_fails_above_the_threshold(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgfast.export.verify.THRESHOLDS", {"fp32": 1e-12})
    refused(copy, ExportError, "differs from its checkpoint", verify=True)


def test_verification_on_given_pictures_and_questions(copy: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    data = tmp_path / "samples.jsonl"
    data.write_text(
        '{"image": "red.png", "question": "what color is the shape?"}\n\n{"image": "red.png", "question": "is it red"}\n'
    )
    manifest = export(str(copy), tmp_path / "out", ExportOptions("int8", "cpu", verify_data=data))
    assert manifest.parity is not None
    assert 2 <= manifest.parity["positions"] <= 16
    assert manifest.parity["worst"].startswith("token ")
    assert 0 < manifest.parity["reference_perplexity"] < manifest.parity["perplexity"] * 1.2
    assert manifest.parity["largest_activation"] > 0
    for text, message in (("{broken", "line 1"), ('{"image": "red.png"}', "line 1"), ("", "no samples")):
        data.write_text(text)
        with pytest.raises(ExportError, match=message):
            export(str(copy), tmp_path / "other", ExportOptions(verify_data=data))
    with pytest.raises(ExportError, match="cannot be read"):
        export(str(copy), tmp_path / "other", ExportOptions(verify_data=tmp_path / "nowhere"))
    data.write_text('{"image": "gone.png", "question": "what"}')
    with pytest.raises(ExportError, match=r"line 1: .*gone\.png does not exist"):
        export(str(copy), tmp_path / "other", ExportOptions(verify_data=data))
    assert not (tmp_path / "other").exists()
