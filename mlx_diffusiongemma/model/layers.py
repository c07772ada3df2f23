"""Attention, the dense MLP and self-conditioning: the parts that the encoder and the decoder share.

Attribute names follow the checkpoint's keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from ..config import LayerConfig, TextConfig
from .budgets import SCORE_BUDGET
from .joining import Fusible
from .layer_cache import KeysValues

Seen = KeysValues | list[KeysValues]  # what queries attend to: of all rows together, or row by row
Mask = mx.array | str | None  # of all rows together, see `attend`
Extend = Callable[[mx.array, mx.array], Seen]
Arrays = TypeVarTuple("Arrays")
Result = TypeVar("Result")


def fuse_elementwise(function: Callable[[*Arrays], Result]) -> Callable[[*Arrays], Result]:
    """Compile a chain of elementwise operations into one kernel, on GPUs only: a CPU would need a C++ compiler."""
    compiled = mx.compile(function, shapeless=True)

    def call(*arrays: *Arrays) -> Result:
        return (compiled if mx.default_device() == mx.gpu else function)(*arrays)

    return call


@fuse_elementwise
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Multiply `up` by the GELU of `gate`, in the tanh approximation (`gelu_pytorch_tanh`)."""
    cubic = gate + 0.044715 * gate * gate * gate
    return 0.5 * gate * (1 + mx.tanh(0.7978845608028654 * cubic)) * up


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
    """Attention with scale 1. queries [B, heads, N, D], keys and values [B, kv_heads, M, D] -> [B, heads, N, D].

    mask: None, "causal" (the last query sees all keys), or booleans that broadcast to [B, heads, N, M].
    """
    rows, heads, count, _ = queries.shape
    total = keys.shape[2]
    part = max(SCORE_BUDGET // (4 * rows * heads * total), 1)
    if count <= part:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
    outputs = []
    for start in range(0, count, part):
        stop = min(start + part, count)
        # A causal part sees nothing after its own last query.
        seen = total - count + stop if isinstance(mask, str) else total
        part_mask = mask[..., start:stop, :] if isinstance(mask, mx.array) and mask.shape[-2] > 1 else mask
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], scale=1.0, mask=part_mask
            )
        )
    return mx.concatenate(outputs, axis=2)


def attend_rows(queries: mx.array, seen: Seen, mask: Mask | list[Mask]) -> mx.array:
    """Attention as `attend` computes it, to keys and values of all rows, or row by row to a list with those of each,
    which can differ in length. mask: for a list, one of all rows or a list of each row's own.
    """
    masks = mask if isinstance(mask, list) else [mask] * len(queries)
    if isinstance(seen, tuple):
        return attend(queries, *seen, masks[0])
    return mx.concatenate([attend(queries[row : row + 1], *own, masks[row]) for row, own in enumerate(seen)])


class Attention(Fusible):
    """Grouped-query attention with normalised queries, keys and values. Full layers have no value projection: their
    values are the raw key projection (`DiffusionGemmaDecoderTextAttention`).
    """

    OF_ONE_INPUT = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            layer.num_key_value_heads,
            layer.head_dim,
        )
        self.eps = config.rms_norm_eps
        width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        if layer.is_sliding:
            self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=self.eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=self.eps)
        rope = config.rope_parameters[layer.kind]
        self.rope = initialize_rope(self.head_dim, rope["rope_theta"], False, rope, config.max_position_embeddings)

    def __call__(self, x: mx.array, extend: Extend, offset: int | mx.array, mask: Mask | list[Mask]) -> mx.array:
        """x [B, N, hidden] at positions from `offset` (an int, or one per row), or at each of `offset` [B, N] ->
        [B, N, hidden].

        `extend` takes the new keys and values and returns all that are attended to.
        """
        queries, keys, values = (heads.transpose(0, 2, 1, 3) for heads in self._project(x))
        queries, keys = self._rotated(queries, offset), self._rotated(keys, offset)
        output = attend_rows(queries, extend(keys, values), mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).flatten(2))

    def _rotated(self, heads: mx.array, offset: int | mx.array) -> mx.array:
        if isinstance(offset, int) or offset.ndim < 2:
            return self.rope(heads, offset=offset)
        # RoPE takes positions in a row, from one per batch row: here each token is a batch row of its own.
        rows, _, count, width = heads.shape
        apart = heads.transpose(0, 2, 1, 3).reshape(rows * count, -1, 1, width)
        return self.rope(apart, offset=offset.flatten()).reshape(rows, count, -1, width).transpose(0, 2, 1, 3)

    def _project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Normalised queries, keys and values, each [B, N, heads, head_dim]."""
        shape = (*x.shape[:2], -1, self.head_dim)
        product = self.joined_product(x)
        if product is None:
            queries, keys = self.q_proj(x).reshape(shape), self.k_proj(x).reshape(shape)
            values = self.v_proj(x).reshape(shape) if "v_proj" in self else keys
            return self.q_norm(queries), self.k_norm(keys), mx.fast.rms_norm(values, None, self.eps)
        # A GPU's RMS norm copies slices before it reads them. All heads are normalised at once, and multiplied by their
        # norms' weights afterwards: the same numbers.
        normalised = mx.fast.rms_norm(product.reshape(shape), None, self.eps)
        queries, rest = normalised[:, :, : self.heads], normalised[:, :, self.heads :]
        keys, values = rest[:, :, : self.kv_heads], rest[:, :, -self.kv_heads :]
        return queries * self.q_norm.weight, keys * self.k_norm.weight, values


class GatedProjections(Fusible):
    """The three projections of a gated MLP with a tanh GELU, as the checkpoint names them."""

    OF_ONE_INPUT = ("gate_proj", "up_proj")

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def project(self, x: mx.array) -> mx.array:
        """The MLP's output for x [..., hidden], of the same shape."""
        product = self.joined_product(x)
        gate, up = (self.gate_proj(x), self.up_proj(x)) if product is None else mx.split(product, 2, axis=-1)
        return self.down_proj(geglu(gate, up))


class MLP(GatedProjections):
    """Gated MLP with a tanh GELU."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.project(x)


class SelfConditioning(GatedProjections):
    """Adds what the previous step believed to the canvas's embeddings (`DiffusionGemmaSelfConditioning`)."""

    def __init__(self, hidden: int, intermediate: int, eps: float):
        super().__init__(hidden, intermediate)
        self.pre_norm = nn.RMSNorm(hidden, eps=eps)
        self.eps = eps

    def __call__(self, embeddings: mx.array, soft_embedding: mx.array | None) -> mx.array:
        """Both [B, L, hidden]. None stands for zeros, through which the bias-free MLP gives exactly zero."""
        if soft_embedding is not None:
            embeddings = embeddings + self.project(self.pre_norm(soft_embedding))
        return mx.fast.rms_norm(embeddings, None, self.eps)
