"""Times of steps and memory of a process, taken the same way on both sides."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..worker import memory


@dataclass(slots=True)
class Stopwatch:
    """From the end of one step to the end of the next: preparing data is inside.

    Args:
        warmup: Steps that are not counted.
        counted: Steps that are.
    """

    warmup: int
    counted: int
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loaded_bytes: int | None = None
    begun: float = 0.0

    def loaded(self) -> None:
        """The model is in memory, nothing else is."""
        now = memory()
        self.loaded_bytes = now["anonymous"] + now["file_backed"] if now else None
        self.begun = time.perf_counter()

    def step(self, loss: float) -> bool:
        """A step has ended; says whether it was the last one that counts."""
        self.ends.append(time.perf_counter())
        self.losses.append(loss)
        return len(self.ends) >= self.warmup + self.counted

    def result(self) -> dict[str, object]:
        """What a child process answers: seconds of the counted steps, all losses, bytes.

        `first_seconds` are from the loaded model to the end of the warm-up.
        """
        marks = [self.begun, *self.ends]
        counted = [b - a for a, b in zip(marks[self.warmup :], marks[self.warmup + 1 :], strict=False)]
        return {
            "seconds": counted,
            "first_seconds": marks[self.warmup] - self.begun,
            "losses": self.losses,
            "memory": {"loaded": self.loaded_bytes, "peak": memory().get("peak")},
        }
