"""Fusing: a checkpoint with the adapter merged computes what the adapter does, or says what is lost."""

import mlx.core as mx
import pytest
from adapters import saved_adapter
from conftest import DEMO
from mlx.utils import tree_flatten

from mlx_diffusiongemma import Adapter, AdapterError, CheckpointError, load
from mlx_diffusiongemma.checkpoints.adapter_files import save_adapter
from mlx_diffusiongemma.convert import convert_checkpoint, fuse_adapter
from mlx_diffusiongemma.model.adapters import AdapterConfig, keys_of

TOKENS = mx.arange(40)[None] + 100


def encoded(model) -> mx.array:
    return model.encode(TOKENS, model.make_cache())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fused_checkpoint_computes_what_the_adapter_does(demo_float32, tmp_path, kind):
    model, _ = load(demo_float32)
    keys = keys_of(["all-linear", "experts"] if kind == "lora" else ["all-linear"])
    saved_adapter(model, tmp_path / "adapter", AdapterConfig(kind, keys=keys))
    report = fuse_adapter(demo_float32, tmp_path / "adapter", tmp_path / "fused")
    assert report.lost < 1e-6 and report.modules > 40
    with_adapter, _ = load(demo_float32, adapter=tmp_path / "adapter")
    fused, _ = load(tmp_path / "fused")
    expected = encoded(with_adapter)
    assert mx.abs(encoded(fused) - expected).max() < 1e-4 * mx.abs(expected).max()
    assert mx.abs(encoded(model) - expected).max() > 0.1 * mx.abs(expected).max()


def test_a_quantized_base_loses_some_of_it_and_says_how_much(tmp_path):
    base = tmp_path / "base"
    convert_checkpoint(DEMO, base, bits=8, overrides={"*": "8"})
    model, _ = load(base)
    config = AdapterConfig(keys=keys_of(["mlp"]), num_layers=1)
    saved_adapter(model, tmp_path / "small", config, 0.005)
    saved_adapter(model, tmp_path / "large", config, 0.5)
    lost = [fuse_adapter(base, tmp_path / name, tmp_path / f"fused-{name}").lost for name in ("small", "large")]
    assert lost[0] > 0.2 > lost[1] > 0
    whole = fuse_adapter(base, tmp_path / "large", tmp_path / "whole", dequantize=True)
    assert 0 < whole.lost < lost[1]
    fused, _ = load(tmp_path / "whole")
    names = [name for name, _ in tree_flatten(fused.parameters())]
    assert sum(name.endswith("5.mlp.up_proj.scales") for name in names) == 0
    assert sum(name.endswith("4.mlp.up_proj.scales") for name in names) == 1
    expected, _ = load(base, adapter=tmp_path / "large")
    assert mx.abs(encoded(fused) - encoded(expected)).max() < 0.05 * mx.abs(encoded(expected)).max()


def test_codes_of_other_modes_stay_what_they_are(tmp_path):
    base = tmp_path / "base"
    convert_checkpoint(DEMO, base, mode="mxfp8", bits=8, overrides={"*": "mxfp8"})
    model, _ = load(base)
    saved_adapter(model, tmp_path / "adapter", AdapterConfig(keys=keys_of(["mlp"]), num_layers=1), 0.5)
    report = fuse_adapter(base, tmp_path / "adapter", tmp_path / "fused")
    assert 0 < report.lost < 0.5
    fused, _ = load(tmp_path / "fused")
    assert fused.model.decoder.layers[-1].mlp.up_proj.mode == "mxfp8"
    expected, _ = load(base, adapter=tmp_path / "adapter")
    assert mx.abs(encoded(fused) - encoded(expected)).max() < 0.2 * mx.abs(encoded(expected)).max()


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(demo_float32, tmp_path):
    model, _ = load(demo_float32)
    saved_adapter(model, tmp_path / "separate", AdapterConfig(towers="separate"))
    with pytest.raises(AdapterError, match="one set of weights, and this adapter changes them differently"):
        fuse_adapter(demo_float32, tmp_path / "separate", tmp_path / "out")
    saved_adapter(model, tmp_path / "shared", AdapterConfig())
    with pytest.raises(CheckpointError, match="exists already"):
        fuse_adapter(demo_float32, tmp_path / "shared", tmp_path / "shared")
    save_adapter(tmp_path / "full", Adapter(AdapterConfig("full"), dict(tree_flatten(model.parameters()))))
    base = tmp_path / "quantized"
    convert_checkpoint(DEMO, base, bits=4)
    with pytest.raises(AdapterError, match="Whole weights cannot be put into a quantized checkpoint"):
        fuse_adapter(base, tmp_path / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
