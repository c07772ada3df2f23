"""The community's layout: what is converted here loads in mlx-vlm, and what mlx-vlm converts has the same tensors."""

import importlib.util
import json

import mlx.core as mx
import pytest
from convert_data import DEMO, all_tensors

from mlx_diffusiongemma.config import Quantization
from mlx_diffusiongemma.convert import convert_checkpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")


@pytest.mark.parametrize("bits", [4, 8])
def test_ours_loads_in_mlx_vlm(bits, tmp_path):
    from mlx.utils import tree_flatten
    from mlx_vlm.utils import load_model

    report = convert_checkpoint(DEMO, tmp_path / "ours", bits=bits)
    theirs = dict(tree_flatten(load_model(report.out).parameters()))
    ours = mx.load(str(report.out / "model.safetensors"))
    assert set(ours) == set(theirs)
    assert all(mx.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@pytest.mark.parametrize("bits", [4, 8])
def test_theirs_has_the_same_tensors(bits, tmp_path):
    from mlx_vlm.convert import convert

    convert(str(DEMO), str(tmp_path / "theirs"), quantize=True, q_bits=bits)
    # mlx-community's checkpoints have a quantized vision projection, and so has our recipe; mlx-vlm 0.7 leaves it out.
    report = convert_checkpoint(DEMO, tmp_path / "ours", bits=bits, overrides={"*.embedding_projection": "none"})
    assert all_tensors(report.out) == all_tensors(tmp_path / "theirs")
    assert quantization_of(report.out) == quantization_of(tmp_path / "theirs")


def quantization_of(directory):
    config = json.loads((directory / "config.json").read_text())
    quantization = Quantization.from_dict(config["quantization"])
    return {path: quantization.for_module(path) for path in (name for name in all_tensors(directory))}
