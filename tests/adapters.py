"""Adapters with random arrays, for tests."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_diffusiongemma import Adapter
from mlx_diffusiongemma.checkpoints.adapter_files import save_adapter
from mlx_diffusiongemma.model.adapters import AdapterConfig, put_in, take_out, trained_arrays


def random_adapter(model, config: AdapterConfig, size: float = 0.2) -> Adapter:
    """An adapter of this shape whose arrays all do something; the model stays as it is."""
    put_in(model, config)
    shapes = {name: array.shape for name, array in trained_arrays(model).items()}
    take_out(model)
    keys = mx.random.split(mx.random.key(3), len(shapes))
    return Adapter(
        config,
        {
            name: size * mx.random.normal(shape, key=key) + (1 if name.endswith(".m") else 0)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        },
    )


def saved_adapter(model, directory: Path, config: AdapterConfig, size: float = 0.1) -> Path:
    """The folder of a random adapter."""
    save_adapter(directory, random_adapter(model, config, size))
    return directory
