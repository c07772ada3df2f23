"""Adapters of PEFT (Hugging Face's library; 0.21), read and written as arrays and a configuration: no PyTorch needed.

PEFT stores A [rank, input] and B [output, rank] of each linear layer, under the name of its module. Experts are adapted
as whole parameters, all in one pair of matrices (`lora.ParamWrapper`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import AdapterError
from ..model.adapters import GROUPS, OF_THE_DECODER, Adapter, AdapterConfig, FineTuneType, Towers

ARRAYS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
SINGLE = "model."  # where both towers are one stack of layers
STACKS = {"decoder.": DECODER, "encoder.language_model.": ENCODER, "": SINGLE}
GATE_UP, DOWN = GROUPS["experts"]
KEYS = [key for keys in GROUPS.values() for key in keys]
PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m"}
NAME = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(?P<stack>decoder\.|encoder\.language_model\.|)"
    r"(?P<layer>layers\.\d+\.|)(?P<path>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
# What changes the base's own weights, or how an adapter is computed, beyond what is read here.
REFUSED = {
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "layers that are there twice",
    "lora_bias": "biases",
    **dict.fromkeys(("use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens"), "another form of LoRA"),
    **dict.fromkeys(("kasa_config", "monteclora_config", "velora_config"), "another form of LoRA"),
}
CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start from, which move the base too


@dataclass(frozen=True)
class _Layer:
    """One adapted layer as it is stored: its stack, "layers.N." or nothing, and its key inside them."""

    stack: str
    layer: str
    key: str
    a: mx.array
    b: mx.array
    m: mx.array | None
    rank: int

    @property
    def path(self) -> str:
        return f"{self.stack}{self.layer}{self.key}"


def from_peft(content: Mapping[str, Any], arrays: Mapping[str, mx.array], where: str) -> Adapter:
    """The adapter that PEFT's configuration and arrays stand for. where: what messages call it.

    Layers of lesser rank are filled up with zeros, and a scale of their own goes into `lora_b`: the products are the
    same. Where the towers' arrays are equal, they are one adapter. Raises AdapterError for what is not LoRA or DoRA on
    the layers that can be adapted here.
    """
    _check(content, where)
    layers = _layers(content, arrays, where)
    stacks = {layer.stack for layer in layers if not layer.key.startswith(OF_THE_DECODER)}
    if SINGLE in stacks and len(stacks) > 1:
        raise AdapterError(f"{where} has names of two towers and of one; export it again.")
    rank, scale = max(layer.rank for layer in layers), _scale(content, "", content["r"])
    named: dict[str, mx.array] = {}
    for layer in layers:
        own = _scale(content, layer.path, layer.rank) / scale
        prefix = f"{DECODER if layer.stack == SINGLE else layer.stack}{layer.layer}{layer.key}."
        named[prefix + "lora_a"], named[prefix + "lora_b"] = _oriented(layer, own, rank)
        if layer.m is not None:
            named[prefix + "m"] = layer.m.astype(mx.float32)
    towers: Towers = "shared" if SINGLE in stacks else "separate" if ENCODER in stacks else "decoder"
    if _are_equal(named):
        towers, named = "shared", {name: array for name, array in named.items() if name.startswith(DECODER)}
    present = {layer.key for layer in layers}
    kind: FineTuneType = "dora" if content.get("use_dora") else "lora"
    return Adapter(AdapterConfig(kind, rank, scale, tuple(key for key in KEYS if key in present), -1, towers), named)


def to_peft(adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The adapter as PEFT writes it: the content of `adapter_config.json`, and the arrays.

    PEFT has no adapter for both towers: a shared one is written to each. Raises AdapterError for whole weights.
    """
    config = adapter.config
    if config.fine_tune_type == "full":
        raise AdapterError("PEFT has no form for whole weights; fuse them into a checkpoint instead.")
    arrays: dict[str, mx.array] = {}
    modules, parameters = set[str](), set[str]()
    for path in {name.rpartition(".")[0] for name in adapter.arrays}:
        for target in _targets(path, config.towers):
            home = target.rpartition(".")[0]
            if home.endswith(".experts"):
                parameters.add(target)
                # PEFT wraps the experts once for each parameter, in the order in which they have them.
                is_inner = target.endswith(GATE_UP) and f"{path.removesuffix(GATE_UP)}{DOWN}.lora_a" in adapter.arrays
                place = f"{home}.base_layer" if is_inner else home
            else:
                modules.add(target)
                place = target
            arrays |= {f"{PREFIX}{place}.{part}": array for part, array in _stored(adapter.arrays, path).items()}
    alpha = config.scale * config.rank
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": config.fine_tune_type == "dora",
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "inference_mode": True,
    }
    return content, {name: mx.contiguous(array) for name, array in arrays.items()}


def _check(content: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for what a configuration asks for that this cannot honour."""
    kind, bias, start = content.get("peft_type"), content.get("bias", "none"), content.get("init_lora_weights")
    if kind != "LORA":
        raise AdapterError(f"{where} is an adapter of type {kind!r}; only LoRA and DoRA can be used.")
    if bias != "none":
        raise AdapterError(f"{where} trains biases ({bias!r}), which this model has none of; train with bias 'none'.")
    for name, what in REFUSED.items():
        if content.get(name):
            raise AdapterError(f"{where} has {what} ({name}), which cannot be used; train without.")
    if isinstance(start, str) and start.startswith(CHANGING_THE_BASE):
        raise AdapterError(
            f"{where} starts from {start!r}, which changes the base too; convert it to plain LoRA in PEFT."
        )
    numbers = [content.get("r"), content.get("lora_alpha")]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = content.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(_is_pattern, patterns)):
            raise AdapterError(f"{where} has a {name} that is no object of patterns; copy or train it again.")
        numbers += patterns.values()
    if not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise AdapterError(f"{where} has ranks or scales that are no positive numbers; copy or train it again.")


def _layers(content: Mapping[str, Any], arrays: Mapping[str, mx.array], where: str) -> list[_Layer]:
    """Every adapted layer, its matrices as they are stored. Raises AdapterError."""
    found: dict[tuple[str, str, str], dict[str, mx.array]] = {}
    for name, array in arrays.items():
        match = NAME.fullmatch(name)
        path = match["path"].removesuffix(".base_layer") if match else ""
        if match is None or (path not in KEYS and path != "experts"):
            raise AdapterError(f"{where} adapts {name.removeprefix(PREFIX)}, which cannot be; train without it.")
        part = PARTS[match["part"]]
        if array.ndim != (1 if part == "m" else 2):
            raise AdapterError(f"{where} has {name} of shape {list(array.shape)}; copy or train it again.")
        found.setdefault((STACKS[match["stack"]], match["layer"], match["path"]), {})[part] = array
    layers: list[_Layer] = []
    for (stack, layer, path), parts in found.items():
        expected = {"a", "b", "m"} if content.get("use_dora") else {"a", "b"}
        if parts.keys() != expected:
            raise AdapterError(f"{where} has only a part of {stack}{layer}{path}; copy or train it again.")
        key, rank = path, len(parts["a"])
        if path.startswith("experts"):
            nested = [(stack, layer, each) for each in ("experts.base_layer", "experts")]
            key = _experts_key(content, parts, [found[each] for each in nested if each in found], where)
            rank = int(_by_pattern(content.get("rank_pattern"), f"{stack}{layer}{key}", content["r"]))
        if len(parts["a"]) % rank or parts["b"].shape[1] != len(parts["a"]):
            raise AdapterError(
                f"{where} has matrices of {stack}{layer}{key} that do not fit each other; copy it again."
            )
        layers.append(_Layer(stack, layer, key, parts["a"], parts["b"], parts.get("m"), rank))
    if not layers:
        raise AdapterError(f"{where} holds no arrays; copy or train it again.")
    return layers


def _experts_key(
    content: Mapping[str, Any], parts: dict[str, mx.array], both: list[dict[str, mx.array]], where: str
) -> str:
    """Which of the experts' parameters a pair of matrices is for: their names do not say it."""
    if len(both) == 2:
        other = both[0] if parts is both[1] else both[1]
        outputs, inputs = len(parts["b"]), parts["a"].shape[1]
        if inputs == len(other["b"]) and outputs == 2 * other["a"].shape[1]:
            return GATE_UP
        if outputs == other["a"].shape[1] and 2 * inputs == len(other["b"]):
            return DOWN
    targets = {target.rpartition(".")[2] for target in content.get("target_parameters") or ()}
    keys = [key for key in (GATE_UP, DOWN) if key.rpartition(".")[2] in targets]
    if len(both) == 2 or len(keys) != 1:
        raise AdapterError(f"{where} does not say which of the experts' weights it adapts; export it again.")
    return keys[0]


def _oriented(layer: _Layer, factor: float, rank: int) -> tuple[mx.array, mx.array]:
    """`lora_a` and `lora_b` of this rank as this model has them, float32; B times `factor`."""
    a, b = layer.a.astype(mx.float32), layer.b.astype(mx.float32) * factor
    extra = rank - layer.rank
    if not layer.key.startswith("experts."):
        return mx.pad(a.T, [(0, 0), (0, extra)]), mx.pad(b.T, [(0, extra), (0, 0)])
    experts = len(a) // layer.rank
    a = a.reshape(experts, layer.rank, -1)
    b = b.reshape(-1, layer.rank, experts).transpose(2, 0, 1)
    return mx.pad(a, [(0, 0), (0, extra), (0, 0)]), mx.pad(b, [(0, 0), (0, 0), (0, extra)])


def _scale(content: Mapping[str, Any], path: str, rank: int) -> float:
    """What the product B A of a layer is multiplied by."""
    alpha = _by_pattern(content.get("alpha_pattern"), path, content["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if content.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """The value of the first pattern that a module's whole path, or the end of it, matches (`get_pattern_key`)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _are_equal(arrays: Mapping[str, mx.array]) -> bool:
    """Whether encoder and decoder have the same arrays."""
    encoder = {name.removeprefix(ENCODER): each for name, each in arrays.items() if name.startswith(ENCODER)}
    decoder = {
        name.removeprefix(DECODER): each for name, each in arrays.items() if name.startswith(f"{DECODER}layers.")
    }
    if not encoder or encoder.keys() != decoder.keys():
        return False
    return all(bool(mx.array_equal(encoder[name], each)) for name, each in decoder.items())


def _stored(arrays: Mapping[str, mx.array], path: str) -> dict[str, mx.array]:
    """The arrays of one adapted layer as PEFT stores them."""
    a, b, m = (arrays.get(f"{path}.{part}") for part in ("lora_a", "lora_b", "m"))
    assert a is not None and b is not None  # an adapter has both of each layer
    if a.ndim == 3:
        return {"lora_A.weight": a.flatten(0, 1), "lora_B.weight": b.transpose(1, 2, 0).flatten(1)}
    stored = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    return stored if m is None else stored | {"lora_magnitude_vector": m}


def _targets(path: str, towers: Towers) -> list[str]:
    """The modules of the published model that an adapted layer stands for."""
    own = path.removeprefix(DECODER)
    return [path, ENCODER + own] if towers == "shared" and own.startswith("layers.") else [path]
