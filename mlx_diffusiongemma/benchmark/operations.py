"""The work of a denoising step: the floating-point operations of each component, by the kind of product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.accounting import visible_tokens
from ..model.scaled import ScaledQuantizedLinear, ScaledQuantizedSwitchLinear

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma

SLIDING_ATTENTION, FULL_ATTENTION = "attention, sliding", "attention, full"
CONDITIONING, DENSE, EXPERTS, VOCABULARY = "embedding, self-conditioning", "dense MLP", "router, experts", "vocabulary"


@dataclass(frozen=True)
class Storage:
    """The way a matrix is stored, and what it is multiplied with. bits: None where it is not quantized."""

    dtype: mx.Dtype  # of the activations
    bits: int | None = None
    group_size: int = 0
    mode: str = ""

    @property
    def name(self) -> str:
        if self.bits is None:
            return str(self.dtype).rpartition(".")[2]
        return f"{self.bits}-bit (group size {self.group_size})" if self.mode == "affine" else self.mode


@dataclass(frozen=True)
class Product:
    """Rows of a canvas times a matrix [outputs, inputs]. transposed: as in a layer; not so in the soft embedding.

    rows_each: where experts share the rows, how many each gets of them; else 0.
    """

    storage: Storage
    rows: int
    transposed: bool = True
    rows_each: int = 0

    @property
    def name(self) -> str:
        if self.rows_each:
            return f"{self.storage.name} experts, {self.rows_each} rows each"
        return f"{self.storage.name} product, {self.rows} rows" + ("" if self.transposed else ", not transposed")


@dataclass(frozen=True)
class Attention:
    """A canvas's queries over all the keys that it sees."""

    dtype: mx.Dtype
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    keys: int

    @property
    def name(self) -> str:
        return f"attention over {self.keys:,} keys, head_dim {self.head_dim}"


Operation = Product | Attention
Counted = dict[Operation, int]


def step_operations(model: DiffusionGemma, context: int) -> dict[str, Counted]:
    """The floating-point operations of one step after `context` tokens: by component, and there by what is computed."""
    config, decoder = model.config, model.model.decoder
    text, rows, dtype = config.text, config.canvas_length, model.dtype
    parts: dict[str, Counted] = {CONDITIONING: _linear(_gated(decoder.self_conditioning), rows, dtype)}
    for layer, block in zip(text.layers, decoder.layers, strict=True):
        counted = parts.setdefault(SLIDING_ATTENTION if layer.is_sliding else FULL_ATTENTION, {})
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        _add(counted, _linear((block.self_attn[name] for name in names if name in block.self_attn), rows, dtype))
        heads, keys = text.num_attention_heads, visible_tokens(layer, text, context) + rows
        attention = Attention(dtype, rows, heads, layer.num_key_value_heads, layer.head_dim, keys)
        _add(counted, {attention: 4 * rows * heads * layer.head_dim * keys})
    dense, experts = parts.setdefault(DENSE, {}), parts.setdefault(EXPERTS, {})
    chosen = rows * text.top_k_experts
    each = max(chosen // text.num_experts, 1)
    for block in decoder.layers:
        _add(dense, _linear(_gated(block.mlp), rows, dtype))
        _add(experts, _linear([block.router.proj], rows, dtype))
        for stack in (block.experts.gate_up_proj, block.experts.down_proj):
            product = Product(_storage(stack, dtype), rows, rows_each=each)
            _add(experts, {product: 2 * chosen * _elements(stack) // text.num_experts})
    head = decoder.embed_tokens
    operations = 2 * rows * _elements(head)
    stored = _storage(head, dtype)
    parts[VOCABULARY] = {Product(stored, rows): operations, Product(stored, rows, transposed=False): operations}
    return parts


def _gated(mlp: nn.Module) -> list[nn.Module]:
    return [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _linear(layers: Iterable[nn.Module], rows: int, dtype: mx.Dtype) -> Counted:
    counted: Counted = {}
    for layer in layers:
        _add(counted, {Product(_storage(layer, dtype), rows): 2 * rows * _elements(layer)})
    return counted


def _add(counted: Counted, more: Counted) -> None:
    for operation, count in more.items():
        counted[operation] = counted.get(operation, 0) + count


def _storage(layer: nn.Module, dtype: mx.Dtype) -> Storage:
    if "scales" not in layer:
        return Storage(dtype)
    if isinstance(layer, ScaledQuantizedLinear | ScaledQuantizedSwitchLinear):
        dtype = mx.float32
    return Storage(dtype, layer.bits, layer.group_size, layer.mode)


def _elements(layer: nn.Module) -> int:
    """Numbers that a layer's matrix holds, or its matrices."""
    size: int = layer.weight.size
    return size * 32 // int(layer.bits) if "scales" in layer else size
