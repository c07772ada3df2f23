"""A checkpoint's configuration and a request's options, read from the files that describe them.

Three spellings of config.json are in use: the hub's (`global_head_dim`, `num_global_key_value_heads`), the one
Transformers >= 5.2x saves (`per_layer_config`), and mlx-community's, which is the hub's with `quantization` and
`generation_config` inside. All three become the same `ModelConfig`.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, PromptError

MODEL_TYPE = "diffusion_gemma"
SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULT_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


@dataclass(frozen=True)
class LayerConfig:
    """What differs between layers: `kind` is "sliding_attention" or "full_attention"."""

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
        theta = _check_object(config.get("rope_parameters") or {}, "vision_config.rope_parameters").get("rope_theta")
        return cls(**_plain_values(cls, {**config, "rope_theta": theta}, "vision_config"))


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized: `overrides` maps a module path to its own (group_size, bits, mode), or to None
    where the module is not quantized.
    """

    group_size: int
    bits: int
    mode: str = "affine"
    overrides: dict[str, Quantization | None] | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Quantization:
        """Read a `quantization` object of config.json. Raises CheckpointError."""
        default = cls._settings(_check_object(config, "quantization"), "quantization")
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
            group_size = bits = mode = None
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
            text=TextConfig.from_dict(_check_object(config["text_config"], "text_config")),
            vision=VisionConfig.from_dict(_check_object(vision, "vision_config")) if vision else None,
            quantization=Quantization.from_dict(quantization) if quantization else None,
        )

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Read `directory`/config.json. Raises CheckpointError."""
        return cls.from_dict(read_json(Path(directory) / "config.json"))


@dataclass(frozen=True)
class GenerationOptions:
    """One request's options. None means the checkpoint's own setting, so nothing replaces its sampler silently.

    max_tokens: most tokens to commit (ours; the checkpoints' own 256 is a single canvas).
    max_steps: most denoising steps per canvas.
    entropy_bound: nats; positions are accepted in ascending entropy while the sum of those before stays within it.
    t_max, t_min: temperature at the first step and the limit it falls to.
    stability: steps for which the argmax canvas must not have changed. 0: always stable.
    confidence: nats; a canvas stops once stable with a mean entropy below this.
    end_tokens: ids that end a reply.
    stop: strings that end a reply; they are not part of it.
    seed: of every random draw. None: another one each time.
    retries: how often a first canvas that would make the reply empty is denoised again. 0: as the model has it.
    canvas_length: tokens per canvas, at most the checkpoint's.
    """

    max_tokens: int = 1024
    max_steps: int | None = None
    entropy_bound: float | None = None
    t_max: float | None = None
    t_min: float | None = None
    stability: int | None = None
    confidence: float | None = None
    end_tokens: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    canvas_length: int | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "end_tokens"):
            if isinstance(getattr(self, name), list | set | frozenset):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, lowest in (
            ("max_tokens", 1),
            ("max_steps", 1),
            ("canvas_length", 1),
            ("stability", 0),
            ("retries", 0),
        ):
            _check_number(self, name, int, lowest)
        check_seed(self.seed)
        for name in ("entropy_bound", "t_max", "t_min", "confidence"):
            _check_number(self, name, float, 0.0)
        if self.t_max == 0:
            raise PromptError("t_max must be above 0; give a low temperature, such as 0.01, for the likeliest tokens.")
        if self.t_max is not None and self.t_min is not None and self.t_max < self.t_min:
            raise PromptError(f"t_max ({self.t_max}) must not be below t_min ({self.t_min}).")
        if not isinstance(self.stop, tuple) or any(not isinstance(text, str) or not text for text in self.stop):
            raise PromptError("stop takes strings of at least one character.")
        tokens = () if self.end_tokens is None else self.end_tokens
        if not isinstance(tokens, tuple) or not all(_is_whole(token, 0) for token in tokens):
            raise PromptError(f"end_tokens takes a list of token ids, not {self.end_tokens!r}.")

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> GenerationOptions:
        """The checkpoint's own settings, filled in with the reference's defaults where it says nothing.

        End tokens are the union of config.json's and generation_config.json's: each file leaves some out.
        Raises CheckpointError.
        """
        directory = Path(directory)
        config = read_json(directory / "config.json")
        path = directory / "generation_config.json"
        generation = read_json(path) if path.exists() else config.get("generation_config") or {}
        inside = [_check_object(config.get(name) or {}, name) for name in ("text_config", "generation_config")]
        declared = [config, *inside, generation]
        end_tokens = sorted({token for source in declared for token in _token_ids(source.get("eos_token_id"))})
        sampler = _check_object(generation.get("sampler_config") or {}, "sampler_config", path.name)
        settings = {
            "max_steps": generation.get("max_denoising_steps"),
            "entropy_bound": sampler.get("entropy_bound"),
            "t_max": generation.get("t_max"),
            "t_min": generation.get("t_min"),
            "stability": generation.get("stability_threshold"),
            "confidence": generation.get("confidence_threshold"),
            "canvas_length": config.get("canvas_length"),
        }
        given = {name: value for name, value in settings.items() if value is not None}
        try:
            return cls(**{**REFERENCE_SETTINGS, **given}, end_tokens=tuple(end_tokens))
        except PromptError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def filled_from(self, checkpoint: GenerationOptions) -> GenerationOptions:
        """These options with every None replaced by the checkpoint's setting."""
        unset = [f.name for f in fields(self) if getattr(self, f.name) is None]
        return replace(self, **{name: getattr(checkpoint, name) for name in unset})


# `_get_default_generation_params` of the reference; the canvas length is its configuration's default.
REFERENCE_SETTINGS = {
    "max_steps": 48,
    "entropy_bound": 0.1,
    "t_max": 0.8,
    "t_min": 0.4,
    "stability": 1,
    "confidence": 0.005,
    "canvas_length": 256,
}


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
        _check_object(per_layer, "per_layer_config")
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
    given = _check_object(config.get("rope_parameters") or {}, "rope_parameters")
    parameters = {kind: {**DEFAULT_ROPE[kind], **_check_object(given.get(kind) or {}, kind)} for kind in DEFAULT_ROPE}
    for kind, rope in parameters.items():
        theta, share = rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
        understood = isinstance(theta, int | float) and isinstance(share, int | float) and theta > 0 and 0 < share <= 1
        if not understood or rope["rope_type"] not in ("default", "proportional"):
            raise CheckpointError(
                f"config.json: the rope_parameters of {kind} layers are not understood; download it again."
            )
    return parameters


def _check_object(value: Any, where: str, file: str = "config.json") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {where} must be an object, not {value!r}; download it again.")
    return value


def _check_count(value: Any, name: str) -> int:
    if not _is_whole(value, 1):
        raise CheckpointError(f"config.json: {name} is {value!r}, not a whole number above 0; download it again.")
    return value


def _plain_values(cls: type, config: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of the dataclass's numbers, flags and strings; those left out take its defaults."""
    kinds = {"int": int, "float": (int, float), "bool": bool, "str | None": str}
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


def _token_ids(value: Any) -> list[int]:
    """The ids in an `eos_token_id`: one, a list of them, or nothing. Raises CheckpointError."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_whole(token, 0) for token in ids):
        raise CheckpointError(f"The checkpoint's eos_token_id is {value!r}, not token ids; download it again.")
    return ids


def check_seed(seed: int | None) -> None:
    """Raises PromptError where `seed` is neither None nor one that random draws can start from."""
    if seed is not None and not (_is_whole(seed, 0) and seed < 2**64):
        raise PromptError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed!r}.")


def _is_whole(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _check_number(options: GenerationOptions, name: str, kind: type, lowest: float) -> None:
    value = getattr(options, name)
    if value is None and name not in ("max_tokens", "retries"):
        return
    accepted = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, accepted) or not value >= lowest:
        what = "a whole number" if kind is int else "a number"
        raise PromptError(f"{name} must be {what} of at least {lowest:g}, not {value!r}.")
