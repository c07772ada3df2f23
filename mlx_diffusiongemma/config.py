"""A checkpoint's configuration, read from the file that describes it.

Three spellings of config.json are in use: the hub's (`global_head_dim`, `num_global_key_value_heads`), the one
Transformers >= 5.2x saves (`per_layer_config`), and mlx-community's, which is the hub's with `quantization` and
`generation_config` inside. All three become the same `ModelConfig`.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MODEL_TYPE = "diffusion_gemma"
SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULT_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


@dataclass(frozen=True)
class LayerConfig:
    """The settings that differ between layers: `kind` is "sliding_attention" or "full_attention"."""

    kind: str
    head_dim: int
    num_key_value_heads: int

    @property
    def is_sliding(self) -> bool:
        return self.kind == SLIDING


@dataclass(frozen=True)
class TextConfig:
    """The shared encoder and decoder stack."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    num_experts: int
    top_k_experts: int
    sliding_window: int
    layers: tuple[LayerConfig, ...]
    rope_parameters: dict[str, dict[str, Any]]
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    max_position_embeddings: int = 131_072
    use_bidirectional_attention: str | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> TextConfig:
        """Read a `text_config` object in any spelling. Raises CheckpointError."""
        if config.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise CheckpointError(
                f"config.json asks for the activation {config['hidden_activation']!r}; "
                "DiffusionGemma uses gelu_pytorch_tanh, so check that this is its configuration."
            )
        if config.get("attention_bias"):
            raise CheckpointError("config.json asks for attention biases, which no DiffusionGemma checkpoint has.")
        if config.get("use_bidirectional_attention") == "all":
            raise CheckpointError(
                'config.json says use_bidirectional_attention "all"; only "vision" (or none) is supported.'
            )
        return cls(
            **_plain_values(cls, config, "text_config"),
            layers=_layers(config),
            rope_parameters=_rope_parameters(config),
        )


@dataclass(frozen=True)
class VisionConfig:
    """Gemma 4's vision tower."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int = 16
    pooling_kernel_size: int = 3
    position_embedding_size: int = 10_240
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    standardize: bool = False
    use_clipped_linears: bool = False

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> VisionConfig:
        theta = check_object(config.get("rope_parameters") or {}, "vision_config.rope_parameters").get("rope_theta")
        return cls(**_plain_values(cls, {**config, "rope_theta": theta}, "vision_config"))


@dataclass(frozen=True)
class Quantization:
    """The way weights are quantized: `overrides` maps a module path to its own (group_size, bits, mode), or to None
    where the module is not quantized.
    """

    group_size: int
    bits: int
    mode: str = "affine"
    overrides: dict[str, Quantization | None] | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Quantization:
        """Read a `quantization` object of config.json. Raises CheckpointError."""
        default = cls._settings(check_object(config, "quantization"), "quantization")
        overrides: dict[str, Quantization | None] = {}
        for path, value in config.items():
            if isinstance(value, dict):
                # An override without a mode is affine, whatever the default mode is.
                merged = {"group_size": default.group_size, "bits": default.bits, **value}
                overrides[path] = cls._settings(merged, path)
            elif value is False:
                overrides[path] = None
        return replace(default, overrides=overrides)

    @classmethod
    def _settings(cls, config: dict[str, Any], where: str) -> Quantization:
        try:
            group_size, bits, mode = int(config["group_size"]), int(config["bits"]), config.get("mode", "affine")
        except (KeyError, TypeError, ValueError, OverflowError):
            group_size, bits, mode = 0, 0, None
        if not isinstance(mode, str) or group_size < 1 or bits < 1:
            raise CheckpointError(
                f"config.json: `{where}` needs whole numbers for group_size and bits, and a mode by name; "
                "convert the checkpoint again."
            )
        return cls(group_size, bits, mode)

    def for_module(self, path: str) -> Quantization | None:
        """The settings of the module at `path`; None where it is named as not quantized."""
        overrides = self.overrides or {}
        return overrides[path] if path in overrides else replace(self, overrides=None)


@dataclass(frozen=True)
class ModelConfig:
    """A DiffusionGemma checkpoint's architecture."""

    text: TextConfig
    vision: VisionConfig | None
    canvas_length: int = 256
    image_token_id: int = 258_880
    boi_token_id: int = 255_999
    eoi_token_id: int = 258_882
    quantization: Quantization | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelConfig:
        """Read config.json's content in any of the three spellings. Raises CheckpointError."""
        if config.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"config.json describes a {config.get('model_type')!r} model, not {MODEL_TYPE!r}; "
                "give a DiffusionGemma checkpoint."
            )
        _require(config, {"text_config"}, "config.json")
        vision, quantization = config.get("vision_config"), config.get("quantization")
        return cls(
            **_plain_values(cls, config, "config.json"),
            text=TextConfig.from_dict(check_object(config["text_config"], "text_config")),
            vision=VisionConfig.from_dict(check_object(vision, "vision_config")) if vision else None,
            quantization=Quantization.from_dict(quantization) if quantization else None,
        )

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Read `directory`/config.json. Raises CheckpointError."""
        return cls.from_dict(read_json(Path(directory) / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise CheckpointError(f"There is no directory {path.parent}; check the path.") from None
        raise CheckpointError(f"{path.parent} has no {path.name}; give a directory with a whole checkpoint.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again.")
    return content


def _layers(config: dict[str, Any]) -> tuple[LayerConfig, ...]:
    """Every layer's kind and head shapes, from either spelling (`__post_init__` of DiffusionGemmaTextConfig)."""
    _require(config, {"num_hidden_layers", "head_dim", "num_key_value_heads"}, "text_config")
    count = _check_count(config["num_hidden_layers"], "num_hidden_layers")
    kinds = config.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    if not isinstance(kinds, list | tuple) or len(kinds) != count or not all(kind in (SLIDING, FULL) for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types must name {count} layers, each {SLIDING!r} or {FULL!r}; download it again."
        )
    kinds = [*kinds[:-1], FULL]  # as the reference forces it
    shape = {"head_dim": config["head_dim"], "num_key_value_heads": config["num_key_value_heads"]}
    per_layer = config.get("per_layer_config")
    if per_layer is not None:
        check_object(per_layer, "per_layer_config")
        if not all(str(index).isdecimal() and isinstance(layer, dict) for index, layer in per_layer.items()):
            raise CheckpointError("config.json: per_layer_config must map layer numbers to objects; download it again.")
        overrides = {int(index): layer for index, layer in per_layer.items()}
    else:
        full = {"head_dim": config.get("global_head_dim") or 512}
        if config.get("num_global_key_value_heads"):
            full["num_key_value_heads"] = config["num_global_key_value_heads"]
        overrides = {i: full for i, kind in enumerate(kinds) if kind == FULL}
    layers = []
    for i, kind in enumerate(kinds):
        override = {name: overrides.get(i, {}).get(name, shape[name]) for name in shape}
        layers.append(LayerConfig(kind, **{name: _check_count(value, name) for name, value in override.items()}))
    return tuple(layers)


def _rope_parameters(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per kind of layer, its RoPE settings; the reference's where the configuration has none."""
    given = check_object(config.get("rope_parameters") or {}, "rope_parameters")
    parameters = {kind: {**DEFAULT_ROPE[kind], **check_object(given.get(kind) or {}, kind)} for kind in DEFAULT_ROPE}
    for kind, rope in parameters.items():
        theta, share = rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
        understood = isinstance(theta, int | float) and isinstance(share, int | float) and theta > 0 and 0 < share <= 1
        if not understood or rope["rope_type"] not in ("default", "proportional"):
            raise CheckpointError(
                f"config.json: the rope_parameters of {kind} layers are not understood; download it again."
            )
    return parameters


def check_object(value: Any, where: str, file: str = "config.json") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {where} must be an object, not {value!r}; download it again.")
    return value


def _check_count(value: Any, name: str) -> int:
    if not is_whole(value, 1):
        raise CheckpointError(f"config.json: {name} is {value!r}, not a whole number above 0; download it again.")
    return int(value)


def _plain_values(cls: type, config: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of the dataclass's numbers, flags and strings; those left out take its defaults."""
    kinds: dict[Any, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str | None": str}
    plain = [f for f in fields(cls) if f.type in kinds]
    _require(config, {f.name for f in plain if f.default is MISSING}, where)
    values = {f.name: config[f.name] for f in plain if config.get(f.name) is not None}
    for f in plain:
        value = values.get(f.name, 1)
        is_flag = f.type == "bool"
        if f.name in values and (not isinstance(value, kinds[f.type]) or isinstance(value, bool) != is_flag):
            raise CheckpointError(f"config.json: {f.name} is {value!r}; download it again.")
        if f.type == "int" and value < (0 if f.name.endswith("_id") else 1):
            raise CheckpointError(f"config.json: {f.name} is {value}; download it again.")
    return values


def _require(config: dict[str, Any], names: set[str], where: str) -> None:
    missing = sorted(name for name in names if config.get(name) is None)
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}; give the configuration of a whole checkpoint.")


def is_whole(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest
