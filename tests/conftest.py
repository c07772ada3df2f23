"""Checkpoints that several tests load: the trained demo, converted once a run."""

from pathlib import Path

import pytest

import mlx_diffusiongemma

DEMO = Path(mlx_diffusiongemma.__file__).parent / "demo"


@pytest.fixture(scope="session")
def demo_float32(tmp_path_factory):
    """The demo checkpoint's directory, unquantized in float32: quantized products are slow on a CPU."""
    from mlx_diffusiongemma.convert import convert_checkpoint

    out = tmp_path_factory.mktemp("checkpoints") / "demo-float32"
    convert_checkpoint(DEMO, out, bits=None, dtype="float32")
    return out


@pytest.fixture(scope="session")
def demo_4bit(tmp_path_factory):
    """The demo checkpoint's directory at 4 bits."""
    from mlx_diffusiongemma.convert import convert_checkpoint

    out = tmp_path_factory.mktemp("checkpoints") / "demo-4bit"
    convert_checkpoint(DEMO, out, bits=4)
    return out
