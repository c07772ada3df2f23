"""Adapters on disk: `adapters.safetensors` and `adapter_config.json` in a folder, as mlx-lm writes them, or PEFT's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx

from ..config import is_whole, read_json
from ..errors import AdapterError
from ..files import WholeFile
from ..model.adapters import Adapter, AdapterConfig, FineTuneType, Towers, keys_of
from ..paths import user_path
from . import peft
from .hub import download_snapshot, is_repository

ARRAYS, CONFIG = "adapters.safetensors", "adapter_config.json"


def load_adapter(path_or_repo: str | Path) -> Adapter:
    """The adapter in a folder or a hub repository, its arrays in memory: ours or PEFT's. Raises AdapterError."""
    if is_repository(path_or_repo):
        directory = download_snapshot(str(path_or_repo), None, (ARRAYS, peft.ARRAYS, CONFIG))
    else:
        directory = user_path(path_or_repo)
    if not (directory / CONFIG).is_file():
        raise AdapterError(f"{directory} has no {CONFIG}; give the folder that training wrote.")
    content = read_json(directory / CONFIG)
    if "peft_type" in content:
        return peft.from_peft(content, read_arrays(directory / peft.ARRAYS), str(directory))
    return Adapter(config_from_json(content, str(directory / CONFIG)), read_arrays(directory / ARRAYS))


def save_adapter(directory: Path, adapter: Adapter) -> None:
    """Write an adapter's two files, each whole or not at all. Raises AdapterError."""
    _write(directory, config_as_json(adapter.config), ARRAYS, adapter.arrays, "mlx")


def export_peft(directory: Path, adapter: Adapter) -> None:
    """Write an adapter's two files as PEFT does, each whole or not at all. Raises AdapterError."""
    content, arrays = peft.to_peft(adapter)
    _write(directory, content, peft.ARRAYS, arrays, "pt")


def _write(directory: Path, content: dict[str, Any], name: str, arrays: Mapping[str, mx.array], form: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with WholeFile(directory / CONFIG) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
        with WholeFile(directory / name) as file:
            mx.save_safetensors(file, dict(arrays), {"format": form})
    except (OSError, RuntimeError) as error:
        raise AdapterError(f"{directory} cannot be written ({error}); make room, or name another folder.") from None


def read_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, in memory. Raises AdapterError."""
    try:
        arrays: Any = mx.load(str(path), format="safetensors")
        mx.eval(arrays)
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); copy or train it again.") from None
    return dict(arrays)


def config_as_json(config: AdapterConfig) -> dict[str, Any]:
    """The content of `adapter_config.json`: mlx-lm's, and which towers are adapted."""
    return {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": {"rank": config.rank, "scale": config.scale, "dropout": 0.0, "keys": list(config.keys)},
        "towers": config.towers,
    }


def config_from_json(content: dict[str, Any], where: str) -> AdapterConfig:
    """Read what `config_as_json` wrote. Raises AdapterError."""
    default = AdapterConfig()
    lora = content.get("lora_parameters") or {}
    kind, towers = content.get("fine_tune_type", "lora"), content.get("towers", "shared")
    rank, scale = lora.get("rank", default.rank), lora.get("scale", default.scale)
    keys, layers = lora.get("keys", list(default.keys)), content.get("num_layers", -1)
    if (
        kind not in get_args(FineTuneType)
        or towers not in get_args(Towers)
        or not is_whole(rank, 1)
        or not is_whole(layers, -1)
        or not isinstance(scale, int | float)
        or not isinstance(keys, list)
    ):
        raise AdapterError(f"{where} does not describe an adapter of this model; copy or train it again.")
    return AdapterConfig(kind, rank, float(scale), keys_of(keys), layers, towers)
