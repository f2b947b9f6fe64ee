"""The Gemma decoder for one new token per row, written for CUDA graphs (shapes and names as in gemma.py)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .gemma import Decoder, Positions
from .layers import Op


class DecoderStep(Decoder):
    """The same decoder for one new token per row, written for CUDA graphs: static shapes, nothing for the host to do.

    The row's place in the cache is an input and an output in one memory, and so are the token and the next one: a step
    leaves behind what the following step needs.
    """

    def forward(  # type: ignore[override]
        self, op: Op, input_ids: ir.Value, last_index: ir.Value, past: list[tuple[ir.Value, ir.Value]], cache_length: int
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value, list[tuple[ir.Value, ir.Value]]]:
        """Run one step.

        Args:
            op: The builder.
            input_ids: int64 [B, 1].
            last_index: int32 [B], cache slot of each row's newest position before this step.
            past: Caches of each layer.
            cache_length: T.

        Returns:
            (logits float32 [B, V], next_token int64 [B, 1], its log-probability float32 [B, 1], int32 [B] slot that was
            written, caches).
        """
        # one lookup adds one and stops at the last slot, so that a row which nobody reads any more never leaves the cache
        following = np.minimum(np.arange(1, cache_length + 1), cache_length - 1).astype(np.int32)
        index = op.Gather(op.Constant(value=ir.tensor(following)), last_index)
        total = op.Constant(value=ir.tensor(np.array(cache_length, dtype=np.int32)))
        cos, sin = self.rotary(op)
        positions = Positions(cos, sin, seqlens_k=index, total_length=total, causal=1)
        normed, present = self._run_layers(op, self._embed(op, input_ids), past, positions, None)
        return *self._choose(op, normed), index, present
