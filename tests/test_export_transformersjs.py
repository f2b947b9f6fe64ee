"""The transformers.js layout: against transformers in Python, and in Node with the npm package itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from conftest import DEMO_CHECKPOINT, TESTS, Shape, make_checkpoint, random_pixels
from pgfast.export.cli import export as export_command
from pgfast.export.plan import ExportOptions
from pgfast.export.transformersjs import export_transformersjs
from pgfast.export.verify import TransformersReference, relative_error

from pgfast.engine import Engine
from pgfast.errors import ExportError

PICTURE = TESTS.parent / "pgfast" / "demo" / "blue_circle.png"
PROMPT = [2, 7, 5, 12, 9, 4]
CONTINUATION = [9, 30, 4, 17, 1100]
NEW_TOKENS = 8
SHAPES = {
    "paligemma": Shape(),
    "paligemma, untied": Shape(tied=False, kv_heads=1),
    "paligemma2": Shape(gemma2=True),
    "paligemma2, untied": Shape(gemma2=True, tied=False),
    "paligemma2, no caps": Shape(gemma2=True, attn_cap=None, final_cap=None),
}
PACKAGE = "@huggingface/transformers"
PACKAGE_VERSION = "4.3.1"
NODE_FOLDER = TESTS.parent / "build" / "node"
QUESTIONS = ("what color is the shape?", "what shape is in the image?")


class Graphs:
    """The three graphs chained as the package chains them."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        suffix = {"fp32": "", "fp16": "_fp16"}[self.config["transformers.js_config"]["dtype"]]
        self.vision, self.embed, self.decoder = (
            onnxruntime.InferenceSession(folder / "onnx" / f"{name}{suffix}.onnx", providers=["CPUExecutionProvider"])
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )

    def prompt(self, pixels: np.ndarray, ids: list[int], keep: int = 1) -> np.ndarray:
        features = self.vision.run(None, {"pixel_values": pixels})[0]
        embeds = np.concatenate([features, self._embed(ids)], axis=1)
        self.cache = {}
        for value in self.decoder.get_inputs():
            if value.name.startswith("past"):
                shape = [{"batch_size": 1}.get(dim, 0) if isinstance(dim, str) else dim for dim in value.shape]
                self.cache[value.name] = np.zeros(
                    shape, {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
                )
        return self._run(embeds, first=1, keep=keep)

    def step(self, token: int) -> np.ndarray:
        return self._run(self._embed([token]), first=1 + next(iter(self.cache.values())).shape[2], keep=1)

    def _embed(self, ids: list[int]) -> np.ndarray:
        return self.embed.run(None, {"input_ids": np.array([ids])})[0]

    def _run(self, embeds: np.ndarray, *, first: int, keep: int) -> np.ndarray:
        feeds = {
            "inputs_embeds": embeds,
            "position_ids": np.arange(first, first + embeds.shape[1])[None],
            "num_logits_to_keep": np.array(keep),
        }
        names = [value.name for value in self.decoder.get_outputs()]
        outputs = dict(zip(names, self.decoder.run(None, feeds | self.cache), strict=True))
        self.cache = {name: outputs[name.replace("past_key_values", "present")] for name in self.cache}
        return outputs["logits"]


def export(checkpoint: Path, out: Path, precision: str = "fp32") -> Path:
    export_transformersjs(str(checkpoint), out, ExportOptions(precision))
    return out


def greedy(
    reference: TransformersReference, pixels: np.ndarray, prompt: list[int], count: int, eos: int | None = None
) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count and (not tokens or tokens[-1] != eos):
        tokens.append(int(reference.logits(pixels, prompt, tokens).argmax()))
    return tokens


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_three_graphs_equal_transformers(shape: Shape, precision: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    graphs = Graphs(export(checkpoint, tmp_path / "out", precision))
    reference = TransformersReference(checkpoint)
    pixels = random_pixels(0, shape.image_size)
    logits = graphs.prompt(pixels, PROMPT)
    # tokens that differ, whatever the model would say: random weights with a tied head repeat themselves
    for count in range(len(CONTINUATION) + 1):
        wanted = reference.logits(pixels, PROMPT, CONTINUATION[:count])
        assert logits.shape == (1, 1, len(wanted))
        assert relative_error(logits[0, -1], wanted) < (1e-4 if precision == "fp32" else 1e-2)
        if precision == "fp32":
            assert logits[0, -1].argmax() == wanted.argmax()
        if count < len(CONTINUATION):
            logits = graphs.step(CONTINUATION[count])


@pytest.mark.parametrize("shape", ["paligemma, untied", "paligemma2, untied"])
def test_greedy_tokens_equal_transformers(shape: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", SHAPES[shape])
    graphs, pixels = Graphs(export(checkpoint, tmp_path / "out")), random_pixels(0, 32)
    tokens = [int(graphs.prompt(pixels, PROMPT)[0, -1].argmax())]
    while len(tokens) < NEW_TOKENS:
        tokens.append(int(graphs.step(tokens[-1])[0, -1].argmax()))
    assert tokens == greedy(TransformersReference(checkpoint), pixels, PROMPT, NEW_TOKENS)
    assert len(set(tokens)) > 1


def test_num_logits_to_keep(checkpoint: Path, tmp_path: Path) -> None:
    graphs = Graphs(export(checkpoint, tmp_path / "out"))
    pixels = random_pixels(0, 32)
    every = graphs.prompt(pixels, PROMPT, keep=0)
    assert every.shape[1] == 16 + len(PROMPT)
    for keep in (1, 3):
        np.testing.assert_allclose(graphs.prompt(pixels, PROMPT, keep=keep), every[:, -keep:], rtol=1e-4, atol=1e-5)


def test_scales_of_the_interface(checkpoint: Path, tmp_path: Path, reference: TransformersReference) -> None:
    """Embeddings raw, image features divided by sqrt(D): what the package and the published decoders expect."""
    import torch
    from safetensors.numpy import load_file

    graphs = Graphs(export(checkpoint, tmp_path / "out"))
    table = load_file(checkpoint / "model.safetensors")["language_model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(graphs.embed.run(None, {"input_ids": np.array([PROMPT])})[0][0], table[PROMPT])
    pixels = random_pixels(0, 32)
    with torch.inference_mode():
        wanted = reference._model.model.get_image_features(torch.from_numpy(pixels)).pooler_output.numpy()
    ours = graphs.vision.run(None, {"pixel_values": pixels})[0]
    assert relative_error(ours * np.sqrt(np.float32(48)), wanted) < 1e-4


def test_bos_is_written_once(checkpoint: Path, tmp_path: Path) -> None:
    """The package's processor writes <bos>; PaliGemma 1's tokenizer.json would add a second."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    out = export(copy, tmp_path / "out")
    assert json.loads((out / "tokenizer.json").read_text())["post_processor"] is None


def test_files_that_the_checkpoint_lacks_are_made(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    for name in ("generation_config.json", "tokenizer_config.json"):
        (copy / name).unlink()
    out = export(copy, tmp_path / "out")
    tokens = json.loads((out / "tokenizer_config.json").read_text())
    assert (tokens["bos_token"], tokens["eos_token"], tokens["pad_token"]) == ("<bos>", "<eos>", "<pad>")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_failed_export_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pgfast.export.transformersjs.ir.save", fail)
    with pytest.raises(ExportError, match="cannot be written"):
        export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists"):
        export(checkpoint, tmp_path / "out")


def test_another_image_token_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"image_token_index": 5}))
    with pytest.raises(ExportError, match="<image>"):
        export(copy, tmp_path / "out")


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    words = [str(checkpoint), str(tmp_path / "out"), "--layout", "transformers.js"]
    assert CliRunner().invoke(export_command, [*words, "--target", "cuda"]).exit_code == 2
    result = CliRunner().invoke(export_command, [*words, "--precision", "fp16"])
    assert result.exit_code == 0, result.output
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.onnx*")}
    graphs = {f"onnx/{name}_fp16.onnx" for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")}
    assert names == graphs | {f"{name}_data" for name in graphs}


@pytest.fixture(scope="session")
def npm_package() -> Path:
    """The npm package, installed once under build/; its ONNX Runtime for the CPU comes inside."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("npm is not installed")
    manifest = NODE_FOLDER / "node_modules" / PACKAGE / "package.json"
    if not manifest.is_file() or json.loads(manifest.read_text())["version"] != PACKAGE_VERSION:
        NODE_FOLDER.mkdir(parents=True, exist_ok=True)
        # without scripts: onnxruntime-node's would download CUDA libraries
        words = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(NODE_FOLDER)]
        done = subprocess.run(
            [*words, f"{PACKAGE}@{PACKAGE_VERSION}"], check=False, timeout=300, capture_output=True, text=True
        )
        if done.returncode != 0:
            assert "CI" not in os.environ, done.stderr  # in CI the package must be had
            pytest.skip(f"npm cannot install {PACKAGE}: {done.stderr[-200:]}")
    return NODE_FOLDER


def ask_in_node(package: Path, model: Path, picture: Path, questions: tuple[str, ...]) -> list[dict[str, Any]]:
    words = ["node", str(TESTS / "transformersjs_answer.mjs"), str(package), str(model), str(picture), *questions]
    result = subprocess.run(words, check=False, timeout=120, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_demo_model_answers_in_node(npm_package: Path, precision: str, demo: Engine, tmp_path: Path) -> None:
    """The whole way of the package: its processor, tokenizer and token loop.

    It resizes pictures without a filter (Pillow has one), which this picture with its plain shape forgives.
    """
    model = export(DEMO_CHECKPOINT, tmp_path / "demo", precision)
    for question, result in zip(QUESTIONS, ask_in_node(npm_package, model, PICTURE, QUESTIONS), strict=True):
        wanted = demo.answer(PICTURE, question)
        assert result["answer"] == wanted.text
        assert result["prompt"][:64] == [json.loads((model / "config.json").read_text())["image_token_index"]] * 64
        assert result["prompt"][64] == 2


@pytest.mark.parametrize("shape", ["paligemma, untied", "paligemma2, untied"])
def test_many_tokens_in_node_equal_transformers(npm_package: Path, shape: str, tmp_path: Path) -> None:
    """Random weights say long nonsense, so the package's cache and positions are followed over several steps."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", SHAPES[shape])
    pixels = random_pixels(0, 32)
    (tmp_path / "picture.f32").write_bytes(pixels.tobytes())
    (result,) = ask_in_node(npm_package, export(checkpoint, tmp_path / "model"), tmp_path / "picture.f32", QUESTIONS[:1])
    wanted = greedy(TransformersReference(checkpoint), pixels, result["prompt"][16:], NEW_TOKENS, eos=1)
    assert result["tokens"] == wanted
    assert len(set(wanted)) > 1
