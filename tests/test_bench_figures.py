"""What `pgfast bench` computes from samples and dimensions: costs, groups, ratios, targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Shape, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from pgfast.bench import performance, summary
from pgfast.bench.cost import Cost
from pgfast.bench.grouping import groups
from pgfast.bench.machine import describe, torch_ceilings
from pgfast.bench.synth import config_of
from pgfast.bench.targets import TARGETS
from pgfast.export.config import parse_config, read_config


def test_full_size_costs() -> None:
    """Figures worked out by hand for PaliGemma-3B at 224 pixels."""
    cost = Cost(parse_config(config_of("3b-224")))
    assert cost.layer_params == pytest.approx(110.1e6, rel=1e-3)
    assert cost.head_params == pytest.approx(526.8e6, rel=1e-3)
    assert cost.decoder_params == pytest.approx(2.509e9, rel=1e-3)
    assert cost.vision_params == pytest.approx(27 * 15.2e6 + 2.4e6, rel=5e-3)
    assert cost.weight_bytes(2) == pytest.approx(5.017e9, rel=1e-3)
    assert cost.cache_bytes(1, bytes_per_value=2) == pytest.approx(18.4e3, rel=2e-3)
    assert cost.attention_flops(266, 266) == pytest.approx(10.4e9, rel=5e-3)
    layers = cost.prefill_flops(266) - cost.attention_flops(266, 266) - 2 * cost.head_params
    assert layers == pytest.approx(1.054e12, rel=1e-3)
    assert cost.vision_flops() == pytest.approx(0.219e12, rel=2e-2)


@pytest.mark.parametrize("shape", [Shape(), Shape(gemma2=True, tied=False, kv_heads=1)], ids=["paligemma", "paligemma2"])
def test_costs_equal_what_torch_counts(shape: Shape, tmp_path: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import PaliGemmaForConditionalGeneration

    checkpoint = make_checkpoint(tmp_path / "checkpoint", shape)
    cost = Cost(read_config(checkpoint / "config.json"))
    model = PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()

    def counted(work: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            work()
        return int(counter.get_total_flops())

    assert cost.vision_flops(2) == counted(lambda: model.model.get_image_features(torch.zeros(2, 3, 32, 32)))
    embeds = torch.zeros(1, 26, shape.hidden)
    # eager attention sees repeated key/value heads; the matmuls are the same
    layers = counted(lambda: model.model.language_model(inputs_embeds=embeds))
    assert cost.prefill_flops(26) == layers + 2 * cost.head_params
    matrices = [p for name, p in model.model.language_model.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert cost.decoder_params == sum(p.numel() for p in matrices) + cost.head_params


@given(st.lists(st.integers(1, 30), max_size=4), st.lists(st.integers(1, 30), max_size=5), st.integers(1, 40))
def test_whoever_fits_together_meets(ours: list[int], peers: list[int], limit: int) -> None:
    our_names, peer_names = [f"our{i}" for i in range(len(ours))], [f"peer{i}" for i in range(len(peers))]
    sizes = dict(zip(our_names + peer_names, ours + peers, strict=True))
    found = groups(our_names, peer_names, sizes, limit)
    for group in found:
        assert sum(sizes[name] for name in group) <= limit
        assert len(set(group)) == len(group)
    for a in our_names:
        for b in our_names + peer_names:
            if a != b and sizes[a] + sizes[b] <= limit:
                assert any(a in group and b in group for group in found)
    assert {name for group in found for name in group} == {name for name in sizes if sizes[name] <= limit}


def sample(contender: str, group: int, number: int, total: float, ttft: float, tokens: int = 4, **more: Any) -> dict[str, Any]:
    place = {"contender": contender, "workload": "short", "group": group, "round": number, "warmup": number == 0}
    return place | {"total": total, "ttft": ttft, "tokens": [[5] * tokens], "vision": None, "each": []} | more


def result(samples: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    names = sorted({s["contender"] for s in samples})
    contenders = [{"name": name, "precision": name.split()[1], "ours": name.startswith("pgfast")} for name in names]
    settings = {"provider": "cpu", "threads": 2, "workloads": ["short"]}
    base = {
        "machine": describe(),
        "date": "today",
        "settings": settings,
        "contenders": contenders,
        "starts": [],
        "ceilings": [],
    }
    return base | {"model": {"config": None}, "samples": samples} | more


OURS, PEER = "pgfast int8", "transformers bf16"


def test_a_ratio_is_the_median_over_rounds_of_one_group() -> None:
    # the machine becomes 10x slower in the second group: medians of all samples would say nonsense
    rounds = [(0, 1, 1.0, 3.0), (0, 2, 1.0, 2.5), (0, 3, 2.0, 5.2)]
    samples = [sample(OURS, g, n, ours, 0.5) for g, n, ours, _ in rounds] + [
        sample(PEER, g, n, peer, 1) for g, n, _, peer in rounds
    ]
    samples += [sample(OURS, 0, 0, 9.0, 1), sample(PEER, 0, 0, 1.0, 1)]  # warm-up
    samples += [sample(OURS, 1, n, 10.0, 5) for n in (1, 2, 3)]
    data = result(samples)
    assert summary.ratio(data, OURS, PEER, "short", "total") == pytest.approx(2.6)
    assert summary.ratio(data, PEER, OURS, "short", "answers_per_second") == pytest.approx(1 / 2.6)
    assert summary.median(summary.values(data, OURS, "short", "per_token")) == pytest.approx((5 / 3 + 0.5) / 2, rel=1)


def test_a_pair_that_had_time_for_one_round_only_has_a_ratio() -> None:
    samples = [sample(OURS, 0, n, 1.0, 0.5) for n in (0, 1, 2)]
    samples += [sample(OURS, 1, 0, 2.0, 1), sample(PEER, 1, 0, 9.0, 4)]
    assert summary.ratio(result(samples), OURS, PEER, "short", "total") == pytest.approx(4.5)


def test_answers_of_other_lengths_give_no_ratio() -> None:
    data = result([sample(OURS, 0, 1, 1.0, 0.5, tokens=2), sample(PEER, 0, 1, 4.0, 1.0, tokens=4)])
    assert summary.ratio(data, OURS, PEER, "short", "total") is None


def test_the_table_of_targets() -> None:
    samples = [s for n in (1, 2, 3) for s in (sample(OURS, 0, n, 1.0, 0.8), sample(PEER, 0, n, 2.4, 1.2))]
    memory = {OURS: 3 * 10**9, PEER: 6 * 10**9}
    starts = [
        {"contender": name, "cold": 5.0, "load": 3.0, "first_answer": 4.0, "memory": {"peak": m}} for name, m in memory.items()
    ]
    data = result(samples, starts=starts)
    for entry in data["contenders"]:
        entry["file_bytes"] = 10**9
    text = performance.performance([("results.json", data)])
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:6]] for line in text.splitlines() if "|" in line
    }
    assert rows["picture + question to 4-token answer, int8, against transformers bf16"] == [">= 2.30x", "2.40x", "", "met"]
    assert rows["time to first token, int8, against transformers bf16"] == [">= 1.90x", "1.50x", "", "**missed**"]
    assert rows["peak memory, int8, of transformers bf16's"] == ["<= 0.60x", "0.50x", "0.17x", "met"]
    for target in TARGETS:
        if target.device == "cuda" or "int4" in target.what:
            assert rows[target.what][1] == "not measured"
    assert "`results.json`" in text


def test_every_target_can_be_measured() -> None:
    from pgfast.bench.workloads import WORKLOADS

    assert len({target.what for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        assert target.of in performance.MEASURES
        assert target.workload in WORKLOADS
        assert target.metric in summary.METRICS


def test_the_roofline_floor() -> None:
    """By hand: 3b-224 in fp16 on a machine of 100 GB/s and 1 TFLOP/s reads 5.017 GB per token: 50.2 ms and the cache."""
    import dataclasses

    config = parse_config(config_of("3b-224"))
    model = {"config": dataclasses.asdict(config), "positions": {"short": 266}}
    limits = {"read_bytes": 100e9, "copy_bytes": 90e9, "fp32_flops": 1e12, "int8_flops": 2e12}
    samples = [sample("transformers bf16", 0, n, 5.3, 5.0) for n in (1, 2)]
    data = result(samples, model=model, ceilings=[limits, {key: value / 2 for key, value in limits.items()}])
    first, step = summary.rooflines(data, "short")
    assert step.floor == pytest.approx((5.017e9 + 266 * 18.43e3) / 100e9, rel=1e-3)
    assert step.seconds == pytest.approx(0.1)
    assert step.share == pytest.approx(0.502, rel=5e-3)
    assert first.floor == pytest.approx(0.219 + 1.054 + 0.0104 + 0.001, rel=1e-2)
    assert list(summary.rooflines(data, "long")) == []  # not part of this run


def test_vision_saved_is_of_the_encoders_own_time() -> None:
    """The first of five questions took 1 s, the others 0.8 s together: a fifth of its time each."""
    each = {"vision": 1.0, "each": [3.0, 9.0, 2.0, 2.0, 2.0], "workload": "questions"}
    target = next(target for target in TARGETS if target.of == "vision saved")
    data = result([sample(target.contender, 0, 1, 18.0, 2.0, later_vision=0.8, **each)])
    assert performance.MEASURES["vision saved"](data, target) == (pytest.approx(0.8), 1.0)


def test_gpu_ceilings_are_measured_with_torch() -> None:
    measured = torch_ceilings("cpu", elements=10**6, side=64, seconds=0.01)
    assert set(measured) == {"copy_bytes", "read_bytes", "fp32_flops", "fp16_flops"}
    assert all(value > 1e5 for value in measured.values())
