"""Linear layers of one input, computed in one product.

One large product keeps a GPU busier than several small ones. The joined layer is not a module of the model: what walks
over modules (parameters, nn.quantize, adapters) finds every weight once, where the checkpoint names it. Whatever
changes there undoes the join, so that it never computes with weights that are no longer the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import mlx.core as mx
import mlx.nn as nn


class Fusible(nn.Module):
    """A module with several linear layers of one input, whose names `OF_ONE_INPUT` lists."""

    OF_ONE_INPUT: tuple[str, ...] = ()
    _joined: Joined | None = None

    def fuse(self) -> None:
        """Compute them in one product, where they are stored alike. Their arrays become views of the joined ones."""
        if self._joined is None or not self._joined.is_of(self):
            self.unfuse()
            layers = [(name, self[name]) for name in self.OF_ONE_INPUT if name in self]
            self._joined = Joined(layers) if _are_stored_alike([layer for _, layer in layers]) else None

    def unfuse(self) -> None:
        """Let each layer compute by itself again."""
        joined, self._joined = self._joined, None
        if joined is not None:
            joined.undo()

    def joined_product(self, x: mx.array) -> mx.array | None:
        """The layers' products side by side, or None where each has to compute its own: where they are not fused, or
        where one of them or its weights have changed since, which undoes the join.
        """
        joined = self._joined  # which another thread may undo meanwhile
        if joined is None:
            return None
        if not joined.is_of(self):
            self.unfuse()
            return None
        return joined.linear(x)


def fusible(module: nn.Module) -> list[Fusible]:
    """All that can be fused in a module, itself included."""
    return [part for part in module.modules() if isinstance(part, Fusible)]


class Joined:
    """One linear layer that computes several. Their arrays become views of its own: nothing is stored twice."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]):
        self.layers = layers
        self.linear = copy(layers[0][1])
        self.linear.update({name: mx.concatenate([layer[name] for _, layer in layers]) for name in self.linear})
        # What each layer holds, for as long as nobody changes it: no bias either, which no join would add.
        self.held: list[tuple[nn.Module, str, mx.array | None]] = [(layer, "bias", None) for _, layer in layers]
        start = 0
        for _, layer in layers:
            stop = start + len(layer.weight)
            for name, array in self.linear.items():
                layer[name] = array[start:stop]
                layer[name].__class__ = Part  # making a Part of it would copy it
                self.held.append((layer, name, layer[name]))
            start = stop

    def is_of(self, owner: nn.Module) -> bool:
        """Whether `owner` still has the layers that were joined, and they what they held then. This is asked at every
        call: it compares identities, in loops that take half the time of all().
        """
        for name, layer in self.layers:
            if owner.get(name) is not layer:
                return False
        for layer, name, array in self.held:  # noqa: SIM110
            if layer.get(name) is not array:
                return False
        return True

    def undo(self) -> None:
        """Let what the layers still hold change in place again."""
        for layer, name, array in self.held:
            if array is not None and layer.get(name) is array:
                array.__class__ = mx.array

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copied model's arrays are no views: it is not fused."""


class Part(mx.array):
    """A part of a joined array. Like a tuple, it does not change in place, where nobody would notice: `weight *= 2`
    makes another array.
    """

    __slots__ = ()  # which lets an array become one

    def __setitem__(self, index: object, value: object) -> None:
        raise TypeError(
            "this weight is joined with others; assign a whole new one, or call unfuse() on the model first"
        )


for operation in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(Part, f"__i{operation}__", getattr(mx.array, f"__{operation}__"))


def _are_stored_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether these are plain or quantized linear layers without biases that one such layer can compute."""
    if any(type(layer) not in (nn.Linear, nn.QuantizedLinear) or "bias" in layer for layer in layers):
        return False
    return len({_storage(layer) for layer in layers}) == 1


def _storage(layer: nn.Module) -> tuple[object, ...]:
    settings = (layer.group_size, layer.bits, layer.mode) if isinstance(layer, nn.QuantizedLinear) else ()
    return type(layer), *settings, *((name, array.dtype) for name, array in sorted(layer.items()))
