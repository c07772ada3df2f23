"""The settings of a training run: the command line over a YAML file over the defaults, in mlx-lm's spellings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from ...config import is_whole
from ...errors import TrainingError
from ...model.adapters import AdapterConfig, FineTuneType, Towers, keys_of
from ...paths import user_path
from ...training.options import TrainingOptions

# YAML 1.1 takes 1e-5, having no point, for text; mlx-lm's files write it so.
POINTLESS = re.compile(r"[-+]?\d+[eE][-+]?\d+")


@dataclass(frozen=True)
class Settings:
    """One run of `mlx-dg train`: where things are, and what to do. Names are mlx-lm's where it has them.

    data: a folder with {train,valid,test}.jsonl. mix: another, whose examples make up `mix_share` of all.
    adapter_path: the folder of the adapter, and of what `resume` goes on from. resume_adapter_file: arrays to begin
    with. report_to: `wandb`, `swanlab` or a path to JSON Lines, comma-separated. clear_cache_threshold: bytes.
    generate, patience and the like are in `options`.
    """

    options: TrainingOptions
    model: str | None = None
    data: str | None = None
    train: bool | None = None
    test: bool = False
    test_batches: int = 500
    adapter_path: str = "adapters"
    resume: bool = False
    resume_adapter_file: str | None = None
    export_peft: str | None = None
    mix: str | None = None
    mix_share: float = 0.05
    report_to: str | None = None
    project_name: str | None = None
    clear_cache_threshold: int | str | None = None

    @property
    def trains(self) -> bool:
        """Whether weights are to change: unless only a test was asked for."""
        return not self.test if self.train is None else self.train


OWN = {field.name: str(field.type) for field in fields(Settings) if field.name != "options"}
OPTIONS = {field.name: str(field.type) for field in fields(TrainingOptions) if field.name != "adapter"}
ADAPTER = ("fine_tune_type", "num_layers", "towers", "lora_keys", "lora_parameters")
SETTINGS = frozenset({*OWN, *OPTIONS, *ADAPTER})
LORA = ("keys", "rank", "scale", "dropout")
# Settings of mlx-lm's files that have but one value here.
FIXED = {"trust_remote_code": False}


def make_settings(given: Mapping[str, Any], config: str | None = None) -> Settings:
    """Put what was `given` on the command line over the YAML file `config`, over the defaults. Raises TrainingError,
    naming the key that is wrong.
    """
    chosen = {**(read_config(config) if config else {}), **given}
    for name, only in FIXED.items():
        if chosen.pop(name, only) != only:
            raise TrainingError(f"{name} can only be {str(only).lower()} here; leave it out.")
    for name, value in chosen.items():
        if name not in ADAPTER and not _has_type(value, OWN.get(name) or OPTIONS[name]):
            raise TrainingError(f"{name} cannot be {value!r}; see mlx-dg train --help.")
    if "optimizer_config" in chosen:  # of each optimizer by its name, of which one is used
        chosen["optimizer_config"] = chosen["optimizer_config"].get(chosen.get("optimizer", TrainingOptions.optimizer))
    options = {name: chosen[name] for name in OPTIONS if name in chosen}
    own = {name: chosen[name] for name in OWN if name in chosen}
    return Settings(options=TrainingOptions(adapter=_adapter(chosen), **options), **own)


def read_config(path: str) -> dict[str, Any]:
    """Read a YAML file of settings; those without a value are left out. Raises TrainingError."""
    import yaml

    try:
        content = _with_numbers(yaml.safe_load(user_path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); check the path after -c.") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"{path} is not YAML ({reason}); correct it.") from None
    if not isinstance(content or {}, dict):
        raise TrainingError(f"{path} holds no settings; write them as `name: value`, one a line.")
    content = content or {}
    _check_known(content, {*SETTINGS, *FIXED}, path)
    return {name: value for name, value in content.items() if value is not None}


def size_in_bytes(text: int | str) -> int:
    """Read a size such as 500M or 4GB, as mlx-lm does. Raises TrainingError."""
    found = re.fullmatch(r"(\d+\.?\d*) *([MG]?)B?", str(text).strip(), re.IGNORECASE)
    if not found:
        raise TrainingError(f"{text!r} is no size; give one such as 500MB or 4GB.")
    return int(float(found[1]) * {"": 1, "M": 10**6, "G": 10**9}[found[2].upper()])


def _with_numbers(content: Any) -> Any:
    """Turn what `POINTLESS` describes into numbers, wherever it stands."""
    if isinstance(content, dict):
        return {name: _with_numbers(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_with_numbers(value) for value in content]
    return float(content) if isinstance(content, str) and POINTLESS.fullmatch(content) else content


def _adapter(chosen: Mapping[str, Any]) -> AdapterConfig:
    """Read the settings of what is trained. Raises TrainingError."""
    lora = chosen.get("lora_parameters", {})
    if not isinstance(lora, dict):
        raise TrainingError("lora_parameters holds settings of its own: keys, rank and scale.")
    _check_known(lora, LORA, "lora_parameters")
    if lora.get("dropout"):
        raise TrainingError(
            "lora_parameters: dropout is not used here, where every draw is noise already; leave it out."
        )
    default = AdapterConfig()
    kind, towers = chosen.get("fine_tune_type", default.fine_tune_type), chosen.get("towers", default.towers)
    layers, rank = chosen.get("num_layers", default.num_layers), lora.get("rank", default.rank)
    keys, scale = chosen.get("lora_keys", lora.get("keys", list(default.keys))), lora.get("scale", default.scale)
    names = keys.split(",") if isinstance(keys, str) else keys
    for name, value, fits, what in (
        ("fine_tune_type", kind, kind in get_args(FineTuneType), f"one of {', '.join(get_args(FineTuneType))}"),
        ("towers", towers, towers in get_args(Towers), f"one of {', '.join(get_args(Towers))}"),
        ("num_layers", layers, is_whole(layers, -1), "a whole number, -1 for all"),
        ("rank", rank, is_whole(rank, 1), "a whole number from 1 on"),
        ("scale", scale, _has_type(scale, "float"), "a number"),
        ("keys", keys, isinstance(names, list) and all(isinstance(key, str) for key in names), "a list of names"),
    ):
        if not fits:
            raise TrainingError(f"{name} is {what}, not {value!r}.")
    return AdapterConfig(kind, rank, float(scale), keys_of([name.strip() for name in names]), layers, towers)


def _check_known(content: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    """Raises TrainingError for a key that is none of `known`."""
    for name in content:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise TrainingError(f"{where}: {str(name)!r} is no setting of training; did you mean {nearest!r}?")


def _has_type(value: Any, written: str) -> bool:
    """Whether `value` is of a type as a dataclass's field writes it; numbers are told from truth values."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "bool": bool,
        "int": int,
        "float": (int, float),
        "str": str,
        "Optimizer": str,
        "Mapping[str, Any]": dict,
    }
    return any(
        isinstance(value, kinds[name]) and (name == "bool" or not isinstance(value, bool))
        for name in written.removesuffix(" | None").split(" | ")
    )
