"""A LoRA adapter merged while exporting equals PEFT's own merge; what cannot be merged is refused before any work."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shape, make_checkpoint, open_model, random_pixels
from pgfast.export import tensors
from pgfast.export.build import export
from pgfast.export.cli import export as command
from pgfast.export.lora import AdaptedCheckpoint
from pgfast.export.plan import ExportOptions
from pgfast.export.tensors import Checkpoint, canonical_name
from pgfast.export.verify import TransformersReference, relative_error
from safetensors.numpy import load_file, save_file

from pgfast.errors import ExportError, MissingDependencyError
from pgfast.manifest import Manifest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPT = [2, 7, 5, 12, 9, 4]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
Tensors = dict[str, np.ndarray]


def make_adapter(checkpoint: Path, folder: Path, targets: list[str] | str = "all-linear", **config: Any) -> Path:
    """Let PEFT write an adapter whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import PaliGemmaForConditionalGeneration

    base = PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 12} | config
    model = get_peft_model(base, LoraConfig(target_modules=targets, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(checkpoint: Path, adapter: Path) -> Tensors:
    """Weights by canonical name."""
    model = TransformersReference(checkpoint, adapter)._model
    return {canonical_name(name): tensor.numpy() for name, tensor in model.state_dict().items()}


def check_merge(checkpoint: Path, adapter: Path) -> set[str]:
    """Compare every tensor with PEFT's; returns the names of the changed ones."""
    plain, ours, wanted = Checkpoint(checkpoint), AdaptedCheckpoint(checkpoint, adapter), merged_by_peft(checkpoint, adapter)
    assert ours.names() == plain.names()
    for name in ours.names():
        before, after = plain.read(name), ours.read(name)
        if name in ours.adapted():
            assert relative_error(after, wanted[name]) < 1e-6, name
            assert relative_error(after, before) > 1e-2, name
        else:
            np.testing.assert_array_equal(after, wanted[name])
            np.testing.assert_array_equal(after, before)
    return ours.adapted()


def logits(bundle: Path) -> np.ndarray:
    opened, model = open_model(bundle)
    model.decoder.prompt(model.encode(random_pixels(0, opened.manifest.image.size)), [PROMPT])
    return model.decoder.logits(0).copy()


@pytest.fixture(scope="module", params=[False, True], ids=["gemma", "gemma2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), Shape(gemma2=request.param))


def test_an_adapter_of_every_linear_layer(base: Path, tmp_path: Path) -> None:
    """Language model, vision tower and projector."""
    adapter = make_adapter(base, tmp_path / "adapter")
    adapted = check_merge(base, adapter)
    assert len(adapted) == 2 * 7 + 2 * 6 + 1
    manifest = export(str(base), tmp_path / "bundle", ExportOptions(verify=True, adapter=adapter))
    reference = TransformersReference(base, adapter).logits(random_pixels(0, 32), PROMPT)
    assert relative_error(logits(tmp_path / "bundle"), reference) < 1e-4
    plain = TransformersReference(base).logits(random_pixels(0, 32), PROMPT)
    assert relative_error(plain, reference) > 1e-2
    assert manifest.source.adapter == "adapter"
    assert manifest.parity is not None
    assert "merged by peft" in manifest.parity["reference"]
    assert Manifest.from_json((tmp_path / "bundle" / "pgfast.json").read_text()) == manifest


@pytest.mark.parametrize(
    ("targets", "config", "count"),
    [
        (ATTENTION, {}, 2 * 4 + 2 * 3),  # SigLIP has q, k and v too; its output is called out_proj
        (["out_proj", "fc1", "fc2"], {"r": 3, "lora_alpha": 5}, 2 * 3),
        (ATTENTION + MLP, {"use_rslora": True}, 2 * 7 + 2 * 3),
        (r".*language_model.*\.(q_proj|up_proj)", {"init_lora_weights": "gaussian"}, 2 * 2),
        (
            [*ATTENTION, *MLP],
            {
                "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7, "up_proj": 3},
                "alpha_pattern": {"language_model.layers.0.self_attn.q_proj": 32, "^.*vision_tower.*k_proj": 3},
            },
            2 * 7 + 2 * 3,
        ),
        (ATTENTION, {"rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 5.5}, "use_rslora": True}, 2 * 4 + 2 * 3),
    ],
    ids=["attention", "vision", "rslora", "regex", "patterns", "patterns-rslora"],
)
def test_merged_weights_equal_pefts(base: Path, tmp_path: Path, targets: Any, config: dict[str, Any], count: int) -> None:
    assert len(check_merge(base, make_adapter(base, tmp_path / "adapter", targets, **config))) == count


def test_pieces_of_a_tensor_get_their_rows_of_the_update(
    checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, name = AdaptedCheckpoint(checkpoint, adapter), "language_model.layers.1.mlp.up_proj.weight"
    whole = ours.read(name)
    monkeypatch.setattr(tensors, "PIECE_BYTES", 7 * 48 * 4)
    pieces = list(ours.pieces(name))
    assert [len(piece) for piece in pieces] == [7] * 10 + [2]
    assert relative_error(np.concatenate(pieces), whole) < 1e-6


@pytest.mark.parametrize("layout", ["before 4.52", "after 4.52"])
def test_adapters_of_older_transformers_are_read(layout: str, checkpoint: Path, adapter: Path) -> None:
    wanted = AdaptedCheckpoint(checkpoint, adapter)

    def rename(name: str) -> str:
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if layout == "before 4.52":
            name = name.replace("model.model.language_model.", "model.language_model.model.")
            name = name.replace("model.model.vision_tower.", "model.vision_tower.")
        return name

    edit_weights(adapter, lambda found: {rename(name): tensor for name, tensor in found.items()})
    ours = AdaptedCheckpoint(checkpoint, adapter)
    assert ours.adapted() == wanted.adapted()
    check_merge(checkpoint, adapter)


def test_a_bfloat16_checkpoint_and_adapter_are_merged_in_fp32(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    import ml_dtypes

    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    for path in (copy / "model.safetensors", adapter / WEIGHTS):
        narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(path).items()}
        save_file(narrow, path, metadata={"format": "pt"})
    check_merge(copy, adapter)


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path, template: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(template, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def template(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(checkpoint, tmp_path_factory.mktemp("template"), ["q_proj", "up_proj"])


def edit_weights(adapter: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS, metadata={"format": "pt"})


def edit_config(adapter: Path, **values: Any) -> None:
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(checkpoint: Path, adapter: Path, message: str, kind: type[Exception] = ExportError, **options: Any) -> None:
    """One line, and neither the folder nor a temporary one is left."""
    before = sorted(adapter.parent.iterdir())
    with pytest.raises(kind, match=message) as caught:
        export(str(checkpoint), adapter.parent / "out", ExportOptions(adapter=adapter, **options))
    assert "\n" not in str(caught.value)
    assert sorted(adapter.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"peft_type": None}, "peft_type None is not supported"),
        ({"use_dora": True}, "use_dora 'True' is not supported; merge it with PEFT"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias 'True' is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out 'True' is not supported"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .*lm_head.* is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication .* is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices .* is not supported"),
        ({"use_of_tomorrow": 1.5}, "use_of_tomorrow '1.5' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' .* changes the base weights"),
        ({"r": 0}, "r is 0, not a rank"),
        ({"r": 5}, r"_proj: lora_A \[4, .*do not have the rank 5"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much', not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is not an object"),
        ({"rank_pattern": {"q_proj": 1.5}}, "q_proj is 1.5, not a rank"),
        ({"rank_pattern": {"q_proj": 2}}, "do not have the rank 2"),
        ({"alpha_pattern": {"(": 2}}, "is no regular expression"),
        ({"alpha_pattern": {"nowhere": 2}}, "the key 'nowhere' of alpha_pattern matches no layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_not_supported_are_named(
    checkpoint: Path, adapter: Path, values: dict[str, Any], message: str
) -> None:
    edit_config(adapter, **values)
    refused(checkpoint, adapter, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {name: tensor for name, tensor in found.items() if name != KEY.format("B")}, "q_proj.* has no lora_B"),
        (lambda found: {name: tensor for name, tensor in found.items() if name != KEY.format("A")}, "q_proj.* has no lora_A"),
        (lambda found: found | {KEY.format("A"): np.full_like(found[KEY.format("A")], np.nan)}, "q_proj.* holds NaN"),
        (lambda found: found | {KEY.format("B"): np.ones((3, 4), np.float32)}, r"lora_B \[3, 4\] do not fit .*another model"),
        (lambda found: found | {KEY.format("A"): np.ones(4, np.float32)}, r"lora_A \[4\] and .* do not fit"),
        (lambda found: found | {KEY.format("A"): np.ones((4, 48), np.int8)}, "q_proj.* has type I8"),
        (lambda found: {name.replace("layers.1", "layers.7"): x for name, x in found.items()}, "7.* fits no tensor"),
        (lambda found: {name.replace("q_proj", "query"): x for name, x in found.items()}, "query.* fits no tensor"),
        (lambda found: found | {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones(3, np.float32)}, "embedding_A"),
        (lambda found: found | {KEY.format("magnitude_vector"): np.ones(64, np.float32)}, "magnitude_vector.* not supported"),
        (lambda found: {name.removeprefix("base_model.model."): x for name, x in found.items()}, "is not supported: only"),
        (lambda found: {}, "holds no tensors"),
    ],
)
def test_tensors_that_cannot_be_merged_are_named(
    checkpoint: Path, adapter: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    edit_weights(adapter, change)
    refused(checkpoint, adapter, message)


@pytest.mark.parametrize("module", ["lm_head", "model.language_model.lm_head", "model.language_model.embed_tokens"])
def test_the_head_and_the_embedding_are_refused(checkpoint: Path, adapter: Path, module: str) -> None:
    rows = load_file(checkpoint / "model.safetensors")["language_model.model.embed_tokens.weight"].shape[0]
    pair = {"A": np.ones((4, 48), np.float32), "B": np.ones((rows, 4), np.float32)}
    new = {f"base_model.model.{module}.lora_{part}.weight": tensor for part, tensor in pair.items()}
    edit_weights(adapter, lambda found: found | new)
    refused(checkpoint, adapter, "the embedding or the vocabulary head is not supported")


def test_a_convolution_and_a_second_update_are_refused(checkpoint: Path, adapter: Path) -> None:
    name = "base_model.model.model.vision_tower.embeddings.patch_embedding.lora_{}.weight"
    pair = {name.format("A"): np.ones((4, 3, 8, 8), np.float32), name.format("B"): np.ones((32, 4, 1, 1), np.float32)}
    edit_weights(adapter, lambda found: found | pair)
    refused(checkpoint, adapter, r"LoRA on .*patch_embedding.* of shape \[32, 3, 8, 8\] is not supported")
    old = KEY.replace("model.model.language_model", "model.language_model.model")
    edit_weights(
        adapter,
        lambda found: (
            {key: found[key] for key in found if key not in pair} | {old.format(x): found[KEY.format(x)] for x in ("A", "B")}
        ),
    )
    refused(checkpoint, adapter, "two updates of language_model.layers.0.self_attn.q_proj.weight")


def test_an_update_beyond_fp32_is_an_error(checkpoint: Path, adapter: Path) -> None:
    edit_weights(adapter, lambda found: {name: np.full_like(tensor, 1e25) for name, tensor in found.items()})
    refused(checkpoint, adapter, r"q_proj\.weight is beyond fp32's range")


def test_an_adapter_for_another_model_is_refused(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    larger = make_checkpoint(tmp_path_factory.mktemp("larger"), Shape(hidden=64))
    refused(larger, adapter, "do not fit the checkpoint's .*another model")


def test_incomplete_adapters_say_what_is_missing(checkpoint: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    refused(checkpoint, adapter, rf"{WEIGHTS} is damaged")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(checkpoint, adapter, rf"no {WEIGHTS} in .* is a pickle")
    (adapter / "adapter_model.bin").unlink()
    refused(checkpoint, adapter, rf"no {WEIGHTS} in ")
    for text, message in (("{", "cannot be read"), ("[]", "not a JSON object")):
        (adapter / CONFIG).write_text(text)
        refused(checkpoint, adapter, message)
    (adapter / CONFIG).unlink()
    refused(checkpoint, adapter, rf"no {CONFIG} in .*save_pretrained")


def test_verification_needs_peft(checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(checkpoint, adapter, r"peft is not installed: pip install 'pgfast\[verify\]'", MissingDependencyError, verify=True)


def test_verification_notices_another_adapter(checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptedCheckpoint, "pieces", Checkpoint.pieces)
    refused(checkpoint, adapter, "the bundle differs from its checkpoint", verify=True)


def test_what_peft_cannot_load_is_one_line(checkpoint: Path, adapter: Path) -> None:
    edit_config(adapter, target_modules=["nothing_of_the_kind"])
    refused(checkpoint, adapter, "PEFT cannot merge the adapter: .*nothing_of_the_kind", verify=True)


def test_the_command_takes_an_adapter_and_needs_no_peft(
    checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch", "transformers", "peft"):
        monkeypatch.setitem(sys.modules, module, None)
    command.main([str(checkpoint), str(tmp_path / "out"), "--adapter", str(adapter)], standalone_mode=False)
    assert json.loads((tmp_path / "out" / "pgfast.json").read_text())["source"]["adapter"] == "adapter"
