"""The community's layout: what is converted here loads in mlx-vlm, and what mlx-vlm converts has the same tensors."""

import importlib.util
import json

import mlx.core as mx
import pytest
from convert_data import DEMO, all_tensors, copy_demo, read_tensors
from convert_formats import fp8_tensors, nvfp4_tensors, quantize_experts

from mlx_diffusiongemma.config import Quantization
from mlx_diffusiongemma.convert import convert_checkpoint

MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")


@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 8}, {"bits": None}, {"mode": "mxfp4"}, {"mode": "mxfp8"}, {"mode": "nvfp4"}, {"recipe": "compact"}],
    ids=str,
)
def test_ours_loads_in_mlx_vlm(options, tmp_path):
    from mlx.utils import tree_flatten
    from mlx_vlm.utils import load_model

    report = convert_checkpoint(DEMO, tmp_path / "ours", **options)
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


@pytest.mark.parametrize(("encode", "settings"), [(nvfp4_tensors, MODELOPT), (fp8_tensors, COMPRESSED)])
def test_nvfp4_and_fp8_equal_what_mlx_vlm_loads(encode, settings, tmp_path):
    from mlx.utils import tree_flatten
    from mlx_vlm.utils import load_model

    encoded, _ = quantize_experts(read_tensors(DEMO / "model.safetensors"), encode)
    source = copy_demo(tmp_path / "source", lambda _: encoded, quantization_config=settings)
    theirs = dict(tree_flatten(load_model(source).parameters()))
    carried = {"overrides": {"*": "none", "*.experts.*": "nvfp4"}} if encode is nvfp4_tensors else {"bits": None}
    ours = mx.load(str(convert_checkpoint(source, tmp_path / "ours", **carried).out / "model.safetensors"))
    assert set(ours) == set(theirs)
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    reloaded = dict(tree_flatten(load_model(tmp_path / "ours").parameters()))
    assert all(mx.array_equal(reloaded[name], theirs[name]) for name in theirs)


def quantization_of(directory):
    config = json.loads((directory / "config.json").read_text())
    quantization = Quantization.from_dict(config["quantization"])
    return {path: quantization.for_module(path) for path in (name for name in all_tensors(directory))}
