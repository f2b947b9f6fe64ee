"""Arithmetic and memory traffic of a model, counted from its dimensions: what the roofline is drawn from.

A multiply-add is 2 FLOP. Norms, activations, softmax and rotations are left out (below 1 % of a full-size model).
"""

from __future__ import annotations

from dataclasses import dataclass

from pgfast.export.config import PaliGemmaConfig


@dataclass(frozen=True, slots=True)
class Cost:
    """Counts of one model."""

    config: PaliGemmaConfig

    @property
    def layer_params(self) -> int:
        """Matrices of a decoder layer: q, k, v, o, gate, up, down."""
        t = self.config.text
        q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
        return t.hidden_size * (q + 2 * kv) + q * t.hidden_size + 3 * t.hidden_size * t.intermediate_size

    @property
    def head_params(self) -> int:
        """The vocabulary head (the embedding itself when tied)."""
        return self.config.text.vocab_size * self.config.text.hidden_size

    @property
    def decoder_params(self) -> int:
        """What one decoding step reads: all layers and the head."""
        return self.config.text.num_hidden_layers * self.layer_params + self.head_params

    @property
    def vision_params(self) -> int:
        """Matrices of the vision encoder and the projector."""
        v = self.config.vision
        layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
        patch, project = v.patch_dim * v.hidden_size, v.hidden_size * self.config.text.hidden_size
        return v.num_hidden_layers * layer + patch + project

    def vision_flops(self, batch: int = 1) -> float:
        """One picture: every matrix at every patch, and attention of all patches to all."""
        v = self.config.vision
        attention = 4 * v.num_image_tokens**2 * v.hidden_size * v.num_hidden_layers
        return float(batch) * (2.0 * self.vision_params * v.num_image_tokens + attention)

    def prefill_flops(self, positions: int, batch: int = 1) -> float:
        """A prompt: every layer at every position, attention of all to all, the head at the last position."""
        t = self.config.text
        layers = 2.0 * t.num_hidden_layers * self.layer_params * positions
        return batch * (layers + self.attention_flops(positions, positions) + 2.0 * self.head_params)

    def attention_flops(self, queries: int, keys: int) -> float:
        """Scores and weighted sums of all layers."""
        t = self.config.text
        return 4.0 * queries * keys * t.num_attention_heads * t.head_dim * t.num_hidden_layers

    def step_flops(self, past: int, batch: int = 1) -> float:
        """One new token per row after `past` positions."""
        return batch * (2.0 * self.decoder_params + self.attention_flops(1, past + 1))

    def cache_bytes(self, positions: int, batch: int = 1, *, bytes_per_value: float = 4.0) -> float:
        """Keys and values of all layers."""
        t = self.config.text
        return 2.0 * batch * positions * t.num_hidden_layers * t.num_key_value_heads * t.head_dim * bytes_per_value

    def weight_bytes(self, bytes_per_weight: float) -> float:
        """What one decoding step reads of the weights, whatever the batch."""
        return self.decoder_params * bytes_per_weight
