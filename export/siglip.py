"""The SigLIP vision tower and the projector, as transformers' SiglipVisionModel and PaliGemmaMultiModalProjector.

Shapes: B pictures, C channels, R image size, G patches per side, P = G * G, W tower width, D decoder width.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import nn

from .config import PaliGemmaConfig, VisionConfig
from .layers import PLAIN, Dialect, LayerNorm, Linear, Op, gelu_tanh
from .storage import Storage


class PatchEmbedding(nn.Module):
    """Cut the picture into patches and embed each.

    A reshape and a matmul instead of a convolution with stride = kernel: the same sums, and cuDNN is not needed.
    """

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.projection = Linear(config.patch_dim, config.hidden_size, dtype, bias=True)
        self.position = nn.Parameter([config.num_image_tokens, config.hidden_size], dtype)
        self._config = config

    def forward(self, op: Op, pixel_values: ir.Value) -> ir.Value:
        """[B, C, R, R] to [B, P, W]."""
        c = self._config
        side = c.image_size // c.patch_size
        x = op.Reshape(pixel_values, [-1, c.num_channels, side, c.patch_size, side, c.patch_size])  # [B, C, G, p, G, p]
        x = op.Transpose(x, perm=[0, 2, 4, 1, 3, 5])  # [B, G, G, C, p, p]
        x = op.Reshape(x, [-1, side * side, c.patch_dim])  # [B, P, C * p * p]
        return op.Add(self.projection(op, x), self.position)


class VisionAttention(nn.Module):
    """Self-attention of all patches to all patches, no mask."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType, storage: Storage) -> None:
        super().__init__()
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, dtype, bias=True, storage=storage)
        self.out = Linear(config.hidden_size, config.hidden_size, dtype, bias=True, storage=storage)
        self._heads, self._width = config.num_attention_heads, config.hidden_size

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[B, P, W] to [B, P, W]."""
        q, k, v = op.Split(self.qkv(op, x), [self._width] * 3, axis=-1, _outputs=3)  # [B, P, W] each
        scale = (self._width // self._heads) ** -0.5
        # no softmax_precision: TensorRT's parser refuses it, and every provider's kernel accumulates in fp32 anyway
        y = op.Attention(q, k, v, q_num_heads=self._heads, kv_num_heads=self._heads, scale=scale)
        return self.out(op, y)


class VisionLayer(nn.Module):
    """One encoder layer: pre-norm attention, pre-norm feed-forward with tanh-GELU."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType, dialect: Dialect, storage: Storage) -> None:
        super().__init__()
        self._dtype, self._dialect = dtype, dialect
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.attention = VisionAttention(config, dtype, storage)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype, bias=True, storage=storage)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype, bias=True, storage=storage)

    def forward(self, op: Op, x: ir.Value) -> ir.Value:
        """[B, P, W] to [B, P, W]."""
        x = op.Add(x, self.attention(op, self.norm1(op, x)))
        inner = gelu_tanh(op, self.fc1(op, self.norm2(op, x)), self._dtype, self._dialect)
        return op.Add(x, self.fc2(op, inner))


class VisionEncoder(nn.Module):
    """Picture to image features: patches, encoder, post layernorm, linear projector."""

    def __init__(
        self,
        config: PaliGemmaConfig,
        dtype: ir.DataType,
        features_dtype: ir.DataType,
        dialect: Dialect,
        storage: Storage = PLAIN,
    ) -> None:
        super().__init__()
        vision = config.vision
        self.embedding = PatchEmbedding(vision, dtype)
        self.layers = nn.ModuleList([VisionLayer(vision, dtype, dialect, storage) for _ in range(vision.num_hidden_layers)])
        self.post_norm = LayerNorm(vision.hidden_size, vision.layer_norm_eps, dtype)
        self.projector = Linear(vision.hidden_size, config.text.hidden_size, dtype, bias=True)
        self._dtype, self._features_dtype = dtype, features_dtype

    def forward(self, op: Op, pixel_values: ir.Value) -> ir.Value:
        """[B, C, R, R] float32 to [B, P, D] in the type the decoder takes."""
        x = pixel_values if self._dtype is ir.DataType.FLOAT else op.Cast(pixel_values, to=self._dtype.value)
        x = self.embedding(op, x)
        for layer in self.layers:
            x = layer(op, x)
        features = self.projector(op, self.post_norm(op, x))
        return features if self._dtype is self._features_dtype else op.Cast(features, to=self._features_dtype.value)
