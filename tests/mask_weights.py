"""Random weights for the mask decoder, in the layout of big_vision's `vae-oid.npz`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CONVOLUTIONS = {
    "decoder.0": (128, 512, 1, 1),
    **{f"decoder.{i}.net.{j}": (128, 128, k, k) for i in (2, 3) for j, k in ((0, 3), (2, 3), (4, 1))},
    "decoder.12": (1, 16, 1, 1),
}
UPSAMPLINGS = {
    "decoder.4": (128, 128, 4, 4),
    "decoder.6": (128, 64, 4, 4),
    "decoder.8": (64, 32, 4, 4),
    "decoder.10": (32, 16, 4, 4),
}


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Every layer keeps the scale of what flows through, so that masks have both signs."""
    rng = np.random.default_rng(seed)
    weights = {"_vq_vae._embedding": rng.normal(size=(128, 512))}
    for name, shape in (CONVOLUTIONS | UPSAMPLINGS).items():
        up = name in UPSAMPLINGS
        inputs = shape[0] * 4 if up else shape[1] * shape[2] * shape[3]  # of a 4 x 4 kernel with stride 2, 4 places meet
        weights[f"{name}.weight"] = rng.normal(size=shape) * (2 / inputs) ** 0.5
        weights[f"{name}.bias"] = rng.normal(size=shape[1 if up else 0]) * 0.1
    return {name: value.astype(np.float32) for name, value in weights.items()}


def save_weights(path: Path, weights: dict[str, np.ndarray] | None = None) -> Path:
    np.savez(path, **(random_weights() if weights is None else weights))  # type: ignore[arg-type]
    return path
