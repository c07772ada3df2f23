"""Where a denoising step's time goes: each component by itself, over all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from . import operations
from .ceilings import Ceilings, seconds_of
from .decoding import TEMPERATURE, step_seconds

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DecoderLayer, DiffusionGemma


@dataclass(frozen=True)
class Component:
    """A part of a step, over all layers.

    operations: floating-point operations. share_of_ceiling: 0 to 1, the time that its products would take if each went
    at the best rate for matrices stored like its own, measured just before and after; norms and the like count against
    it. A component that is faster than that has shown a better rate itself, and reaches 1.
    """

    name: str
    seconds: float
    operations: int
    share_of_ceiling: float


def measure_step(model: DiffusionGemma, cache: Cache, ceilings: Ceilings) -> tuple[list[Component], float]:
    """Every component by itself, and a whole step of the trunk and the vocabulary: seconds of it."""
    decoder, length = model.model.decoder, model.config.canvas_length
    tokens = mx.random.randint(0, model.config.text.vocab_size, (1, length), key=mx.random.key(1))
    x, key = model.embed(tokens), mx.random.key(2)
    mx.eval(tokens, x, key)
    attention = {
        kind: [(layer, kept) for layer, kept in zip(decoder.layers, cache.layers, strict=True) if _kind(kept) == kind]
        for kind in dict.fromkeys(_kind(kept) for kept in cache.layers)
    }

    def attend(layers: list[tuple[DecoderLayer, Any]]) -> mx.array:
        def one(layer: tuple[DecoderLayer, Any], x: mx.array) -> mx.array:
            block, kept = layer
            output = block.self_attn(block.input_layernorm(x), kept.with_canvas, cache.offset, None)
            kept.settle()
            return output

        return _in_turn(layers, one, x)

    parts: dict[str, Callable[[], object]] = {
        operations.CONDITIONING: lambda: decoder.self_conditioning(model.embed(tokens), x),
        **{kind: partial(attend, layers) for kind, layers in attention.items()},
        operations.DENSE: lambda: _in_turn(decoder.layers, _dense, x),
        operations.EXPERTS: lambda: _in_turn(decoder.layers, _routed, x),
        operations.VOCABULARY: lambda: model.read_vocabulary(x, TEMPERATURE, key),
    }

    counted = operations.step_operations(model, cache.offset)
    components = [_component(name, work, counted[name], ceilings) for name, work in parts.items()]
    cache.release()
    return components, step_seconds(model, cache, length)


def _kind(kept: Any) -> str:
    return operations.FULL_ATTENTION if kept.window is None else operations.SLIDING_ATTENTION


def _in_turn(layers: list[Any], work: Callable[[Any, mx.array], mx.array], x: mx.array) -> mx.array:
    """Do the `work` of every layer on the same x, one after the other as in the model."""
    output = x
    for layer in layers:
        output = work(layer, mx.depends(x, [output]))
    return output


def _dense(layer: DecoderLayer, x: mx.array) -> mx.array:
    return layer.mlp(layer.pre_feedforward_layernorm(x))


def _routed(layer: DecoderLayer, x: mx.array) -> mx.array:
    tokens = x.reshape(-1, x.shape[-1])
    return layer.experts(layer.pre_feedforward_layernorm_2(tokens), *layer.router(tokens))


def _component(
    name: str, work: Callable[[], object], counted: dict[operations.Operation, int], ceilings: Ceilings
) -> Component:
    seconds, rates = ceilings.around(counted, lambda: seconds_of(work, 0.3))
    least = sum(count / rates[operation] for operation, count in counted.items())
    return Component(name, seconds, sum(counted.values()), min(least / seconds, 1.0))
