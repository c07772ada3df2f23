"""Adapters: small trained arrays beside frozen weights (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353).

An adapted layer stands where its linear layer stood, under the names that mlx-lm's adapters have. The encoder and the
decoder are one stack of layers; where an adapter is not for both alike, the encoder gets layers of its own, which share
every weight of the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import AdapterError
from .scaled import ScaledQuantizedLinear, ScaledQuantizedSwitchLinear

if TYPE_CHECKING:
    from .diffusion_gemma import DecoderLayer, DiffusionGemma

Towers = Literal["shared", "separate", "decoder"]
FineTuneType = Literal["lora", "dora", "full"]

# What the names of `keys` stand for: paths inside a layer, and for self-conditioning inside the decoder.
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": tuple(f"self_attn.{name}_proj" for name in "qkvo"),
    "mlp": tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "router": ("router.proj",),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "self-conditioning": tuple(f"self_conditioning.{name}_proj" for name in ("gate", "up", "down")),
}
ALL_LINEAR = ("attention", "mlp", "router", "self-conditioning")  # what the model's report adapts
OF_THE_DECODER = "self_conditioning."
TRAINED = ("lora_a", "lora_b", "m")


@dataclass(frozen=True)
class AdapterConfig:
    """The shape of an adapter, as `adapter_config.json` says it.

    fine_tune_type: "lora", "dora", or "full", where the adapter is whole weights. keys: paths of linear layers inside a
    layer ("self_attn.q_proj"), or "self_conditioning.…". num_layers: the last so many layers, -1 for all. towers: which
    of encoder and decoder are adapted: both with the same arrays, each with its own, or the decoder alone.
    """

    fine_tune_type: FineTuneType = "lora"
    rank: int = 8
    scale: float = 2.0
    keys: tuple[str, ...] = GROUPS["attention"] + GROUPS["mlp"]
    num_layers: int = -1
    towers: Towers = "shared"


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: its shape and its arrays, by their names in the model that it is put into."""

    config: AdapterConfig
    arrays: Mapping[str, mx.array]


class LowRank(nn.Module):
    """A linear layer and a low-rank change to it: y = W x + scale · B (A x), in the dtype of W x.

    lora_a: A transposed, [input, rank], float32. lora_b: B transposed, [rank, output], float32.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, key: mx.array):
        super().__init__()
        output, inner = dense_shape(linear)
        self.linear = linear
        self.scale = scale
        self.lora_a = _uniform((inner, rank), inner, key)
        self.lora_b = mx.zeros((rank, output))

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., input] -> [..., output]."""
        product = self.linear(x)
        return product + (self.scale * ((x @ self.lora_a) @ self.lora_b)).astype(product.dtype)

    def merged(self) -> mx.array:
        """The one weight that computes the same, [output, input] float32."""
        return dense_weight(self.linear) + self.scale * (self.lora_a @ self.lora_b).T


class LowRankDirection(LowRank):
    """DoRA: a low-rank change turns each row of W, and `m` [output], float32, says how long the row is.

    As in the paper (§4.3) and in PEFT, no gradient flows through the length of the changed rows.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, key: mx.array):
        super().__init__(linear, rank, scale, key)
        self._squares = mx.square(dense_weight(linear)).sum(-1)
        mx.eval(self._squares)
        self.m = mx.sqrt(self._squares)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., input] -> [..., output]."""
        product = self.linear(x)
        changed = product.astype(mx.float32) + self.scale * ((x @ self.lora_a) @ self.lora_b)
        return (changed * (self.m / self._lengths())).astype(product.dtype)

    def merged(self) -> mx.array:
        """The one weight that computes the same, [output, input] float32."""
        return (self.m / self._lengths())[:, None] * super().merged()

    def _lengths(self) -> mx.array:
        """Lengths of the rows of W + scale · BA, [output], without either matrix: |w + d|² = |w|² + 2 w·d + |d|²."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        across = (b * self.linear(a.T).astype(mx.float32)).sum(0)  # row · row of scale-free BA
        change = (b * ((a.T @ a) @ b)).sum(0)
        return mx.sqrt(self._squares + 2 * self.scale * across + self.scale**2 * change)


class LowRankSwitch(nn.Module):
    """The experts' linear layers, and a low-rank change to each: lora_a [experts, rank, input], lora_b [experts,
    output, rank], float32, which is the layout of mlx-lm's `LoRASwitchLinear`.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, key: mx.array):
        super().__init__()
        experts = len(linear.weight)
        output, inner = dense_shape(linear)
        self.linear = linear
        self.scale = scale
        self.lora_a = _uniform((experts, rank, inner), inner, key)
        self.lora_b = mx.zeros((experts, output, rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, input] and the experts' numbers -> [..., 1, output]."""
        product = self.linear(x, indices, sorted_indices=sorted_indices)
        change = x.astype(mx.float32)
        for array in (self.lora_a, self.lora_b):
            change = mx.gather_mm(change, array.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
        return product + (self.scale * change).astype(product.dtype)

    def merged(self) -> mx.array:
        """The one weight that computes the same, [experts, output, input] float32."""
        return dense_weight(self.linear) + self.scale * (self.lora_b @ self.lora_a)


Adapted = LowRank | LowRankSwitch


def dense_shape(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, quantized or not, or of each of an expert's."""
    if "scales" not in linear:
        return cast(tuple[int, int], linear.weight.shape[-2:])
    return linear.weight.shape[-2], linear.scales.shape[-1] * linear.group_size


def dense_weight(linear: nn.Module) -> mx.array:
    """The weight of a linear layer as float32, [..., output, input]."""
    if "scales" not in linear:
        return linear.weight.astype(mx.float32)
    weight = mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    ).astype(mx.float32)
    if isinstance(linear, ScaledQuantizedLinear | ScaledQuantizedSwitchLinear):
        scale = linear.weight_scale_2
        weight = weight * scale.reshape(*scale.shape, *[1] * (weight.ndim - scale.ndim))
    return weight


def keys_of(names: Sequence[str]) -> tuple[str, ...]:
    """The paths that groups ("attention", "experts", "all-linear") and paths stand for. Raises AdapterError."""
    known = [key for keys in GROUPS.values() for key in keys]
    found: list[str] = []
    for name in names:
        if name == "all-linear":
            found += keys_of(ALL_LINEAR)
        elif name in GROUPS:
            found += GROUPS[name]
        elif name in known:
            found.append(name)
        else:
            raise AdapterError(
                f"{name!r} is no linear layer that can be adapted; give some of {', '.join([*GROUPS, 'all-linear'])}, "
                f"or paths such as {known[0]}."
            )
    return tuple(dict.fromkeys(found))


def put_in(model: DiffusionGemma, config: AdapterConfig, seed: int = 0) -> None:
    """Put a fresh adapter, which changes nothing yet, in the place of the one that a model has. Raises AdapterError."""
    take_out(model)
    keys = keys_of(config.keys)
    if config.fine_tune_type == "dora" and any(key in GROUPS["experts"] for key in keys):
        raise AdapterError("DoRA has no form for experts; leave them out of the keys, or train with LoRA.")
    decoder, encoder = model.model.decoder, model.model.encoder.language_model
    first = 0 if config.num_layers < 0 else max(len(decoder.layers) - config.num_layers, 0)
    if config.towers != "shared":
        encoder.layers = [
            _twin(layer, own.layer_scalar) for layer, own in zip(decoder.layers, encoder.layers, strict=True)
        ]
    random = _keys(seed)
    of_decoder = [key for key in keys if key.startswith(OF_THE_DECODER)]
    of_layers = [key for key in keys if key not in of_decoder]
    for layer, own in list(zip(decoder.layers, encoder.layers, strict=True))[first:]:
        _adapt(layer, config, of_layers, random)
        if config.towers == "separate":
            _adapt(own, config, of_layers, random)
    _adapt(decoder, config, of_decoder, random)


def use_adapter(model: DiffusionGemma, adapter: Adapter | None) -> None:
    """Put a trained adapter, or whole weights, in the place of what a model has, or nothing. Raises AdapterError."""
    take_out(model)
    if adapter is None:
        return
    try:
        if adapter.config.fine_tune_type == "full":
            _use_whole(model, adapter.arrays)
        else:
            put_in(model, adapter.config)
            # A layer without arrays stays as it is put in, which changes nothing: PEFT's can leave out single layers.
            given = {name.rpartition(".")[0] for name in adapter.arrays}
            fresh = trained_arrays(model)
            untouched = {name: array for name, array in fresh.items() if name.rpartition(".")[0] not in given}
            use_arrays(model, fresh, {**untouched, **adapter.arrays})
    except AdapterError:
        take_out(model)
        raise
    mx.eval(model)


def take_out(model: DiffusionGemma) -> None:
    """Make the model what it was before `put_in` or `use_adapter`."""
    from .diffusion_gemma import DecoderLayer, EncoderLayer

    if model.own_weights is not None:
        model.load_weights(list(model.own_weights.arrays.items()), strict=False)
        model.own_weights = None
    decoder, encoder = model.model.decoder, model.model.encoder.language_model
    for owner, name, layer in [*adapted(decoder), *adapted(encoder)]:
        owner[name] = layer.linear
    for number, own in enumerate(encoder.layers):
        if isinstance(own, DecoderLayer):
            encoder.layers[number] = EncoderLayer()
            encoder.layers[number].layer_scalar = own.layer_scalar


def use_arrays(model: DiffusionGemma, expected: Mapping[str, mx.array], arrays: Mapping[str, mx.array]) -> None:
    """Give a model other arrays for `expected`, its trained ones. Raises AdapterError where they are not the same."""
    if problem := _difference(expected, arrays):
        raise AdapterError(f"The adapter does not fit this model: {problem}; use it with the model it was trained on.")
    model.load_weights([(name, array.astype(expected[name].dtype)) for name, array in arrays.items()], strict=False)


def _use_whole(model: DiffusionGemma, arrays: Mapping[str, mx.array]) -> None:
    """Give a model other weights, as `full` training leaves them, and keep its own to go back to."""
    own = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))
    if problem := _difference({name: own[name] for name in arrays if name in own}, arrays):
        raise AdapterError(
            f"These trained weights do not fit this model: {problem}; use them with the model that was trained, "
            "unquantized."
        )
    model.own_weights = Adapter(AdapterConfig("full"), {name: own[name] for name in arrays})
    model.load_weights([(name, array.astype(own[name].dtype)) for name, array in arrays.items()], strict=False)


def trained_arrays(model: DiffusionGemma) -> dict[str, mx.array]:
    """The arrays of the model's adapter, by name."""
    flat = cast(list[tuple[str, Any]], tree_flatten(model.parameters()))
    return {name: array for name, array in flat if name.rpartition(".")[2] in TRAINED}


def adapted(module: nn.Module) -> Iterator[tuple[nn.Module, str, Adapted]]:
    """Every adapted layer inside a module: what it is a part of, its name there, and itself."""
    for _, owner in module.named_modules():
        if isinstance(owner, Adapted):
            continue
        for name, child in list(owner.items()):
            if isinstance(child, Adapted):
                yield owner, name, child


def _adapt(root: nn.Module, config: AdapterConfig, keys: list[str], random: Iterator[mx.array]) -> None:
    """Put adapted layers in the place of those that `keys` name; full layers have no value projection."""
    for key in keys:
        path, _, name = key.rpartition(".")
        owner = root[path]
        if name not in owner:
            continue
        kind: type[Adapted] = LowRankDirection if config.fine_tune_type == "dora" else LowRank
        if path == "experts":
            kind = LowRankSwitch
        owner[name] = kind(owner[name], config.rank, config.scale, next(random))


def _twin(layer: DecoderLayer, scalar: mx.array) -> DecoderLayer:
    """A layer of its own with the same weights, down to the linear layers, which it shares."""
    twin = copy(layer)
    for name in ("self_attn", "mlp", "router", "experts"):
        twin[name] = copy(layer[name])
    twin.layer_scalar = scalar
    return twin


def _keys(seed: int) -> Iterator[mx.array]:
    key = mx.random.key(seed)
    while True:
        key, now = mx.random.split(key)
        yield now


def _uniform(shape: tuple[int, ...], inputs: int, key: mx.array) -> mx.array:
    bound = 1 / math.sqrt(inputs)
    return mx.random.uniform(-bound, bound, shape, key=key)


def _difference(expected: Mapping[str, mx.array], given: Mapping[str, mx.array]) -> str:
    """The first way in which names or shapes differ, or nothing."""
    for name in expected:
        if name not in given:
            return f"{name} is missing"
    for name, array in given.items():
        if name not in expected:
            return f"{name} is not part of it"
        if array.shape != expected[name].shape:
            return f"{name} is {list(array.shape)} instead of {list(expected[name].shape)}"
    return ""
