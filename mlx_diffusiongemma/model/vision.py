"""Gemma 4's vision tower and the projection into the language model: patches of pixels in, embeddings out.

Attribute names follow the checkpoint's keys under `model.encoder.`. One image at a time and without padding: images
differ in size, and a padded patch changes nothing but the cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn

from ..config import VisionConfig
from ..errors import CheckpointError, PromptError

# Metal's fused attention kernel has these head sizes. Any other materialises the scores: 3 GB for 10,080 patches in
# bfloat16, which the published tower's heads of 72 would.
FUSED_HEAD_DIMS = (64, 80, 128)


class VisionModel(nn.Module):
    """The image half of `model.encoder` (`DiffusionGemmaEncoderModel.get_image_features`)."""

    def __init__(self, vision: VisionConfig, text_hidden: int):
        super().__init__()
        self.vision_tower = VisionTower(vision)
        self.embed_vision = VisionEmbedder(vision, text_hidden)

    def __call__(self, pixels: mx.array, positions: mx.array) -> mx.array:
        """pixels [patches, patch_size² * 3] in 0…1 and positions [patches, 2] int32 of one image
        -> [soft_tokens, text_hidden]. Raises PromptError where the image is too long for the checkpoint.
        """
        return self.embed_vision(self.vision_tower(pixels, positions))


class VisionTower(nn.Module):
    """Patches to soft tokens (`Gemma4VisionModel`). Raises CheckpointError for a variant that is not supported."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.use_clipped_linears:
            raise CheckpointError(
                "config.json asks for use_clipped_linears, which no DiffusionGemma checkpoint has; "
                "check that this is its configuration."
            )
        if config.head_dim % 4:
            raise CheckpointError(f"config.json: the vision head_dim is {config.head_dim}, not a multiple of 4.")
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    def __call__(self, pixels: mx.array, positions: mx.array) -> mx.array:
        """pixels [patches, patch_size² * 3] in 0…1, positions [patches, 2] int32, (x, y) of a whole grid whose sides
        are multiples of the pooling kernel -> [soft_tokens, hidden], in reading order and the weights' dtype.
        """
        hidden = self.encoder(self.patch_embedder(pixels, positions), positions)
        # √hidden can leave float16's range, and the bias cancels large values: float32 until standardised.
        soft = pool(hidden.astype(mx.float32), positions, self.config.pooling_kernel_size)
        soft = soft * math.sqrt(self.config.hidden_size)
        if self.config.standardize:
            soft = (soft - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return soft.astype(hidden.dtype)


class VisionEmbedder(nn.Module):
    """Soft tokens [soft_tokens, vision hidden] to embeddings [soft_tokens, text_hidden]
    (`DiffusionGemmaMultimodalEmbedder`).
    """

    def __init__(self, vision: VisionConfig, text_hidden: int):
        super().__init__()
        self.eps = vision.rms_norm_eps
        self.embedding_projection = nn.Linear(vision.hidden_size, text_hidden, bias=False)

    def __call__(self, soft: mx.array) -> mx.array:
        return self.embedding_projection(mx.fast.rms_norm(soft, None, self.eps))


class PatchEmbedder(nn.Module):
    """A projection of each patch plus an embedding of its column and one of its row (`Gemma4VisionPatchEmbedder`)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.ones((2, config.position_embedding_size, config.hidden_size))

    def __call__(self, pixels: mx.array, positions: mx.array) -> mx.array:
        table = self.position_embedding_table
        side = int(positions.max()) + 1
        if side > table.shape[1]:  # MLX reads past a table's end without an error
            raise PromptError(
                f"The image is {side} patches long and this checkpoint takes at most {table.shape[1]}; "
                "use a smaller image budget."
            )
        patches = self.input_proj((2 * (pixels - 0.5)).astype(table.dtype))
        return patches + (table[0, positions[:, 0]] + table[1, positions[:, 1]])


class VisionEncoder(nn.Module):
    """The transformer: every patch sees every other (`Gemma4VisionEncoder`)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, hidden: mx.array, positions: mx.array) -> mx.array:
        cos, sin = rotations(positions, self.head_dim, self.rope_theta)
        cos, sin = cos.astype(hidden.dtype), sin.astype(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return hidden


class VisionLayer(nn.Module):
    """Attention and MLP, each between two norms (`Gemma4VisionEncoderLayer`)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        h = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin))
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))


class VisionAttention(nn.Module):
    """Bidirectional attention with norms on queries, keys and values, and scale 1 (`Gemma4VisionAttention`)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = WrappedLinear(config.hidden_size, width)
        self.k_proj = WrappedLinear(config.hidden_size, key_width)
        self.v_proj = WrappedLinear(config.hidden_size, key_width)
        self.o_proj = WrappedLinear(width, config.hidden_size)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        heads = (len(x), -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).reshape(heads)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).reshape(heads)), cos, sin)
        v = mx.fast.rms_norm(self.v_proj(x).reshape(heads), None, self.eps)
        return self.o_proj(attend(q, k, v).reshape(len(x), -1))


class VisionMLP(nn.Module):
    """GeGLU with the tanh approximation (`Gemma4VisionMLP`)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gate_proj = WrappedLinear(config.hidden_size, config.intermediate_size)
        self.up_proj = WrappedLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = WrappedLinear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class WrappedLinear(nn.Module):
    """A linear map one level down, where the checkpoint has it: other Gemma 4 towers clip around it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


def rotations(positions: mx.array, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines [patches, 1, 2, head_dim / 4] float32 of axial RoPE: the first half of a head turns with x,
    the second with y, both with the same frequencies (`Gemma4VisionRotaryEmbedding`).
    """
    quarter = head_dim // 4
    frequencies = theta ** (-mx.arange(quarter, dtype=mx.float32) / quarter)
    angles = positions[:, None, :, None] * frequencies
    return mx.cos(angles), mx.sin(angles)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn each half of x [patches, heads, head_dim] by its own angles (`apply_multidimensional_rope`)."""
    halves = x.reshape(*x.shape[:2], 2, 2, -1)  # axis, then the two members of a rotated pair
    a, b = halves[..., 0, :], halves[..., 1, :]
    return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-2).reshape(x.shape)


def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Unmasked attention with scale 1 over [patches, heads, head_dim]; k and v may have fewer heads."""
    head_dim = q.shape[-1]
    # Zeros at a head's end change no score and no value; more than a few would cost more than fusing saves.
    extra = min((size - head_dim for size in FUSED_HEAD_DIMS if 0 <= size - head_dim <= head_dim // 8), default=0)
    q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, extra)]).swapaxes(0, 1)[None] for x in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)
    return out[0, :, :, :head_dim].swapaxes(0, 1)


def pool(hidden: mx.array, positions: mx.array, kernel: int) -> mx.array:
    """The mean over each kernel × kernel square of patches, squares in reading order: [patches, hidden]
    -> [patches / kernel², hidden] (`Gemma4VisionPooler._avg_pool_by_positions`).
    """
    square = positions // kernel
    columns = square[:, 0].max() + 1
    order = mx.argsort(square[:, 0] + columns * square[:, 1])
    return hidden[order].reshape(-1, kernel * kernel, hidden.shape[-1]).mean(axis=1)


def image_blocks(tokens: Sequence[int], image_token_id: int) -> list[tuple[int, int]]:
    """Find every run of image tokens, as (start, end): the blocks that see each other both ways, and that a prefill
    chunk must not split (`get_block_sequence_ids_for_mask`).
    """
    blocks, start = [], 0
    for is_image, run in groupby(tokens, key=lambda token: token == image_token_id):
        end = start + sum(1 for _ in run)
        if is_image:
            blocks.append((start, end))
        start = end
    return blocks
