"""The decoder for CUDA graphs, run on the CPU: numerics are real, and captures behave as ONNX Runtime's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shape, make_checkpoint, random_pixels
from pgfast.export.build import export
from pgfast.export.layers import Dialect
from pgfast.export.plan import ExportOptions
from pgfast.export.verify import TransformersReference, relative_error

from pgfast.bundle import Bundle
from pgfast.errors import BundleError
from pgfast.runtime.buffers import DeviceFeatures, to_device
from pgfast.runtime.cuda_decoder import RING, CudaDecoder
from pgfast.runtime.cuda_graphs import CapturedVision, GraphRunner
from pgfast.runtime.providers import Target
from pgfast.runtime.session import open_session
from pgfast.runtime.shared_weights import SharedWeights

PROMPT = [2, 7, 5, 12, 9, 4]
CPU = Target("cpu", cuda_graph=True)


class Capturing:
    """A session that captures as the CUDA provider does: the first run of an id executes the model three times.

    Args:
        session: Does the work.
        broken: Whether captures fail.
    """

    def __init__(self, session: Any, *, broken: bool = False) -> None:
        self._session, self._broken = session, broken
        self.captured: dict[int, Any] = {}
        self.runs: list[tuple[int, bool]] = []
        """Graph id and whether the run was waited for."""

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run(self, names: Any, feeds: Any, options: Any) -> Any:
        assert options.get_run_config_entry("gpu_graph_id") == "-1"
        return self._session.run(names, feeds, options)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        graph_id = int(options.get_run_config_entry("gpu_graph_id"))
        try:
            waited = options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
        except RuntimeError:  # no such entry
            waited = True
        self.runs.append((graph_id, waited))
        if graph_id != -1 and graph_id not in self.captured:
            if self._broken:
                raise RuntimeError("CUDA failure 901: operation failed due to a previous error during capture")
            self.captured[graph_id] = binding
            for _ in range(2):
                self._session.run_with_iobinding(binding)
        # a replay knows only the addresses it was captured with
        self._session.run_with_iobinding(self.captured.get(graph_id, binding))


class Rig:
    """Sessions of a bundle on the CPU, and decoders over them."""

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        self.bundle = Bundle.open(folder)
        m = self.manifest = self.bundle.manifest
        self.weights = SharedWeights(folder / "decoder.onnx.data", m.graphs["decoder_step"].weights or {}, CPU)
        sessions = {
            graph: open_session(folder / spec.file, spec, CPU, threads=None, weights=self.weights.initializers)
            for graph, spec in m.graphs.items()
            if graph != "vision_encoder"
        }
        self.prompt_session, self.step_session = (Capturing(sessions[g], broken=broken) for g in ("decoder", "decoder_step"))
        vision = m.graphs["vision_encoder"]
        self.vision_session = Capturing(open_session(folder / vision.file, vision, CPU, threads=None), broken=broken)
        self.runner = GraphRunner(CPU)
        self.vision = CapturedVision(self.vision_session, m, CPU, self.runner)
        self.decoder = self.new_decoder()

    def new_decoder(self, slots: int = 8) -> CudaDecoder:
        return CudaDecoder(self.manifest, CPU, self.prompt_session, self.step_session, self.runner, slots)

    def features(self, seed: int) -> np.ndarray:
        return np.asarray(self.vision.encode(random_pixels(seed, self.manifest.image.size)))


@pytest.fixture(scope="module", params=["paligemma", "paligemma2", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # random weights with a tied head repeat one token, so most of the proof is with two tables
    shape = Shape(gemma2=request.param == "paligemma2", tied=request.param == "tied")
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> TransformersReference:
    return TransformersReference(checkpoint)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, so that tokens can be compared; on a GPU fp32 has another dialect and no graph for single tokens."""
    out = tmp_path_factory.mktemp("cuda") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgfast.export.plan.dialect_of", lambda precision, target: Dialect.ORT)
        export(str(checkpoint), out, ExportOptions("fp32", "cuda"))
    return out


@pytest.fixture
def rig(folder: Path) -> Rig:
    return Rig(folder)


def greedy(reference: TransformersReference, seed: int, size: int, prompt: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(reference.logits(random_pixels(seed, size), prompt, tokens).argmax()))
    return tokens


def test_64_greedy_tokens_of_rows_of_different_length_equal_transformers(rig: Rig, reference: TransformersReference) -> None:
    rng = np.random.default_rng(0)
    prompts = [[2, *rng.integers(5, 1000, n).tolist(), 4] for n in (3, 17, 8)]
    features = np.concatenate([rig.features(seed) for seed in range(3)])
    chosen = [rig.decoder.prompt(features, prompts)]
    chosen += [rig.decoder.step(3, burst=burst) for burst in (1, 3, RING, 2 * RING + 1, 34)]
    tokens = np.concatenate([part.tokens for part in chosen])  # [64, 3]
    for row, prompt in enumerate(prompts):
        wanted = greedy(reference, row, rig.manifest.image.size, prompt, 64)
        assert tokens[:, row].tolist() == wanted
        last = reference.logits(random_pixels(row, rig.manifest.image.size), prompt, wanted[:-1])
        assert relative_error(rig.decoder.logits(row), last) < 1e-4
        assert rig.decoder.length(row) == rig.manifest.dimensions.num_image_tokens + len(prompt) + 63
    logprob = np.log(np.exp(last - last.max()).max() / np.exp(last - last.max()).sum())
    assert abs(chosen[-1].logprobs[-1, 2] - logprob) < 1e-4


def test_requests_that_join_and_leave_change_nothing_for_the_others(rig: Rig) -> None:
    """Captures in between run steps of their own; replays and places in the ring go on where they were."""
    prompts = [[2, 9, 30 + row, 4] for row in range(6)]
    features = [rig.features(row) for row in range(6)]
    alone = []
    for row, prompt in enumerate(prompts):
        decoder = rig.new_decoder()
        parts = [decoder.prompt(features[row], [prompt]), decoder.step(1, burst=30)]
        alone.append(np.concatenate([part.tokens for part in parts])[:, 0].tolist())

    decoder, got = rig.decoder, {row: [] for row in range(6)}

    def join(slot: int, row: int) -> None:
        got[row] += decoder.prompt(features[row], [prompts[row]], first=slot).tokens[:, 0].tolist()

    def step(rows: list[int], burst: int) -> None:
        for tokens, row in zip(decoder.step(len(rows), burst=burst).tokens.T.tolist(), rows, strict=True):
            got[row] += tokens

    join(0, 0)
    step([0], 3)
    join(1, 1)
    step([0, 1], 2)
    join(2, 2)
    step([0, 1, 2], 5)  # runs as four rows
    decoder.release(0)
    join(0, 3)  # replays the captured prompt while others are under way
    step([3, 1, 2], 4)
    decoder.release(2)
    step([3, 1], RING + 3)
    join(2, 4)
    join(3, 5)
    step([3, 1, 4, 5], 1)
    for row in range(6):
        assert got[row] == alone[row][: len(got[row])], row


def test_tokens_that_are_given_and_taken_back(rig: Rig, reference: TransformersReference) -> None:
    """Sampling gives each token; scoring choices goes back to the prompt."""
    size, features = rig.manifest.image.size, rig.features(3)
    rig.decoder.prompt(features, [PROMPT])
    length = rig.decoder.length(0)
    for given in ([10, 20, 30], [11, 21]):
        for count in range(len(given)):
            rig.decoder.step(1, np.array(given[count : count + 1]))
        assert relative_error(rig.decoder.logits(0), reference.logits(random_pixels(3, size), PROMPT, given)) < 1e-4
        rig.decoder.rewind(0, length)


def test_a_full_cache_is_never_left(rig: Rig) -> None:
    """A row that is run on after its end stays in its own slots; the neighbour's next answer is untouched."""
    limit = rig.manifest.cache_length
    decoder = rig.decoder
    decoder.prompt(np.concatenate([rig.features(0), rig.features(1)]), [PROMPT, PROMPT])
    decoder.step(2, burst=limit - decoder.length(0))
    before = {name: cache.read()[1].copy() for name, cache in decoder._caches.items()}
    decoder._lengths[0] = limit
    decoder.step(1, burst=20)
    for name, cache in decoder._caches.items():
        np.testing.assert_array_equal(cache.read()[1], before[name])


def test_a_burst_is_launches_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once captured: no copy to the device, one wait and one read per burst, the same addresses each time."""
    rig.decoder.prompt(rig.features(0), [PROMPT])
    rig.decoder.step(1, burst=2 * RING)  # captures every place of the ring
    graphs = len(rig.step_session.captured)
    assert graphs == RING
    written: list[Any] = []
    monkeypatch.setattr("pgfast.runtime.buffers.SlotBuffer.write", lambda self, first, rows: written.append(rows))
    rig.step_session.runs.clear()
    rig.decoder.step(1, burst=RING)
    rig.decoder.step(1, burst=5)
    assert written == []
    ids = [graph_id for graph_id, _ in rig.step_session.runs]
    assert len(set(ids)) == RING
    assert ids[:5] == ids[RING:]  # the ring is taken up where it was left
    assert -1 not in ids
    assert [waited for _, waited in rig.step_session.runs] == [False] * 7 + [True] + [False] * 4 + [True]
    assert len(rig.step_session.captured) == graphs


def test_prompts_are_captured_by_width_in_slot_0_and_nowhere_else(rig: Rig) -> None:
    features = rig.features(0)
    for ids in ([2, 4], [2, 5, 6, 4], [2, *range(5, 25), 4]):
        rig.decoder.prompt(features, [ids])
    assert len(rig.prompt_session.captured) == 2  # 16 and 32 wide
    rig.decoder.prompt(features, [[2, 4]], first=3)
    rig.decoder.prompt(np.repeat(features, 2, axis=0), [[2, 4], [2, 5, 4]])
    assert [graph_id for graph_id, _ in rig.prompt_session.runs[3:]] == [-1, -1]
    assert all(waited for _, waited in rig.prompt_session.runs)


def test_pictures_stay_on_the_device(rig: Rig, folder: Path) -> None:
    pixels = [random_pixels(seed, rig.manifest.image.size) for seed in range(2)]
    encoded = [rig.vision.encode(values) for values in pixels]
    assert all(isinstance(features, DeviceFeatures) for features in encoded)
    spec = rig.manifest.graphs["vision_encoder"]
    session = open_session(folder / spec.file, spec, CPU, threads=None)
    for values, features in zip(pixels, encoded, strict=True):  # the second picture has not overwritten the first
        np.testing.assert_array_equal(np.asarray(features), session.run(None, {"pixel_values": values})[0])
    together = rig.vision.encode(np.concatenate(pixels))
    assert relative_error(np.asarray(together)[1], np.asarray(encoded[1])[0]) < 1e-5
    first = rig.decoder.prompt(encoded[0], [PROMPT])
    np.testing.assert_array_equal(rig.new_decoder().prompt(np.asarray(encoded[0]), [PROMPT]).tokens, first.tokens)


def test_without_working_captures_it_warns_once_and_answers_all_the_same(
    folder: Path, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Rig(folder, broken=True)
    answers = []
    for each in (rig, broken):
        features = each.features(0)
        parts = [each.decoder.prompt(features, [PROMPT]), each.decoder.step(1, burst=11)]
        answers.append(np.concatenate([part.tokens for part in parts]).tolist())
    assert answers[0] == answers[1]
    assert [record.message[:30] for record in caplog.records] == ["CUDA graphs do not work here, "]
    assert broken.step_session.captured == {}


def test_weights_exist_once_on_disk_and_are_handed_to_both_sessions(folder: Path, rig: Rig) -> None:
    import onnx

    assert not (folder / "decoder_step.onnx.data").exists()
    places = {}
    for name in ("decoder", "decoder_step"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
        places[name] = {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in tensors}
    assert places["decoder"] == places["decoder_step"]
    assert {place["location"] for place in places["decoder"].values()} == {"decoder.onnx.data"}
    assert set(rig.weights.initializers) == set(places["decoder"])
    for tensor in onnx.load(folder / "decoder_step.onnx").graph.initializer:
        if tensor.name in rig.weights.initializers:
            np.testing.assert_array_equal(rig.weights.initializers[tensor.name].numpy(), onnx.numpy_helper.to_array(tensor))


@pytest.mark.parametrize(
    "place",
    [
        "float16[4]",
        "float16[4]@-1",
        "float64[4]@0",
        "float16[99999999]@0",
        "float16[2]@99999999999",
        "float16[]@0",
        f"float16[{'9' * 5000}]@0",
    ],
)
def test_a_place_that_makes_no_sense_is_refused(place: str, folder: Path) -> None:
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data"):
        SharedWeights(folder / "decoder.onnx.data", {"norm.weight": place}, CPU)


def test_bfloat16_reaches_the_device_as_it_is() -> None:
    bits = np.arange(6, dtype=np.uint16).reshape(2, 3)
    value = to_device(CPU, bits, bfloat16=True)
    assert value.element_type() == 16
    assert value.shape() == [2, 3]
