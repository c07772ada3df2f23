"""Quantized layers with one more factor: NVFP4's float32 scale per tensor, beside its scales per block.

It multiplies the product in float32, before the rounding to the model's dtype, so that the codes can stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

TENSOR_SCALE = "weight_scale_2"


class ScaledQuantizedLinear(nn.Module):
    """A `QuantizedLinear` whose product is multiplied by `weight_scale_2`, [] or [output]."""

    def __init__(self, linear: nn.QuantizedLinear, scale: mx.array):
        super().__init__()
        self.weight, self.scales, self.weight_scale_2 = linear.weight, linear.scales, scale
        self.group_size, self.bits, self.mode = linear.group_size, linear.bits, linear.mode

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., input] -> [..., output] in the dtype of `x`."""
        product = mx.quantized_matmul(
            x.astype(mx.float32),
            self.weight,
            self.scales,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return (product * self.weight_scale_2).astype(x.dtype)


class ScaledQuantizedSwitchLinear(nn.Module):
    """A `QuantizedSwitchLinear` whose products are multiplied by `weight_scale_2`, [experts] or [experts, output]."""

    def __init__(self, linear: QuantizedSwitchLinear, scale: mx.array):
        super().__init__()
        self.weight, self.scales, self.weight_scale_2 = linear.weight, linear.scales, scale
        self.group_size, self.bits, self.mode = linear.group_size, linear.bits, linear.mode

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [rows, 1, input], indices [rows] -> [rows, 1, output] in the dtype of `x`."""
        product = mx.gather_qmm(
            x.astype(mx.float32),
            self.weight,
            self.scales,
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )
        scale = self.weight_scale_2.reshape(self.weight.shape[0], -1)[indices]
        return (product * scale[..., None, :]).astype(x.dtype)


SCALED = {nn.QuantizedLinear: ScaledQuantizedLinear, QuantizedSwitchLinear: ScaledQuantizedSwitchLinear}


def add_tensor_scales(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replace the quantized layers of `model` for whose tensor scales there is a shape. The scales themselves are 1."""

    def replace(path: str, module: nn.Module) -> nn.Module:
        shape = shapes.get(f"{path}.{TENSOR_SCALE}")
        return module if shape is None or type(module) not in SCALED else SCALED[type(module)](module, mx.ones(shape))

    leaves = model.leaf_modules()
    model.update_modules(tree_map_with_path(replace, leaves, is_leaf=nn.Module.is_module))
