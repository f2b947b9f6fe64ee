"""What was promised about speed, as data: the table of `docs/performance.md` is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Target:
    """One promise.

    `of` is how it is measured (`performance.MEASURES` has them all); `value` is a lower or an upper bound in its unit.
    """

    what: str
    of: str
    bound: Literal[">=", "<="]
    value: float
    unit: str
    contender: str
    against: str = ""
    workload: str = "short"
    metric: str = "total"
    device: Literal["cpu", "cuda"] = "cpu"


INT8, INT4, FP16, FP32, BF16 = "pgfast int8", "pgfast int4", "pgfast fp16", "transformers fp32", "transformers bf16"
TARGETS = (
    Target("picture + question to 4-token answer, int8, against transformers bf16", "ratio", ">=", 2.3, "x", INT8, BF16),
    Target("picture + question to 4-token answer, int8, against transformers fp32", "ratio", ">=", 7, "x", INT8, FP32),
    Target("time to first token, int8, against transformers bf16", "ratio", ">=", 1.9, "x", INT8, BF16, metric="ttft"),
    Target("per token, int4, against transformers bf16", "ratio", ">=", 7, "x", INT4, BF16, "long", "per_token"),
    Target("peak memory, int8, of transformers bf16's", "memory ratio", "<=", 0.6, "x", INT8, BF16),
    Target("peak memory, int4, of transformers bf16's", "memory ratio", "<=", 0.4, "x", INT4, BF16),
    Target(
        "second question on the same picture, int8: share of the vision time saved",
        "vision saved",
        ">=",
        0.95,
        "",
        INT8,
        workload="questions",
    ),
    Target("load to first answer, int4, warm page cache", "first answer", "<=", 4, "s", INT4),
    Target("batch 16 against batch 1 in tokens/s, int8", "batch gain", ">=", 1.3, "x", INT8, workload="batch-16"),
    Target("per token, batch 1, fp16", "median", "<=", 0.0015, "s", FP16, workload="long", metric="per_token", device="cuda"),
    Target(
        "per token, batch 1, fp16: share of the memory roofline",
        "roofline",
        ">=",
        0.78,
        "",
        FP16,
        workload="long",
        metric="per_token",
        device="cuda",
    ),
    Target("time to first token, batch 1, fp16", "median", "<=", 0.004, "s", FP16, metric="ttft", device="cuda"),
    Target("4-token answer, fp16, against transformers eager bf16", "ratio", ">=", 10, "x", FP16, BF16, device="cuda"),
    Target(
        "4-token answer, fp16, against transformers compiled, static cache",
        "ratio",
        ">=",
        1.3,
        "x",
        FP16,
        f"{BF16} compiled",
        device="cuda",
    ),
    Target(
        "answers/s, batch 32, 3-token answers, fp16",
        "rate",
        ">=",
        250,
        " answers/s",
        FP16,
        workload="answers",
        metric="answers_per_second",
        device="cuda",
    ),
)
