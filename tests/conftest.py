"""Checkpoints that several tests load: the trained demo, converted once a run."""

from pathlib import Path

import pytest

import mlx_diffusiongemma

DEMO = Path(mlx_diffusiongemma.__file__).parent / "demo"


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory, monkeypatch):
    """What a test remembers and caches is its own, and never the user's."""
    for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))


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


@pytest.fixture(scope="session")
def server(demo_float32):
    """A running server with the demo checkpoint, for tests that only ask it."""
    from servers import loader, running

    with running(loader(demo_float32)) as live:
        yield live
