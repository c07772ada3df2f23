"""Adapters: what they compute, put in and taken out, by name and on disk."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapters import random_adapter
from mlx.utils import tree_flatten
from random_models import TINY, config_json, random_model, true_pattern

from mlx_diffusiongemma import Adapter, AdapterError, load, load_adapter
from mlx_diffusiongemma.checkpoints.adapter_files import save_adapter
from mlx_diffusiongemma.model.adapters import (
    GROUPS,
    AdapterConfig,
    adapted,
    dense_weight,
    keys_of,
    put_in,
    take_out,
    trained_arrays,
)

TOKENS = mx.arange(40)[None] % 100
EVERYTHING = keys_of(["all-linear", "experts"])


@pytest.fixture
def model():
    return random_model(config_json(true_pattern(6), 32), None)


def states(model) -> tuple[mx.array, mx.array]:
    """What the encoder and the decoder compute."""
    cache = model.make_cache()
    hidden = model.encode(TOKENS, cache)
    canvas = model.denoise(TOKENS[:, :32], cache, mx.ones((1, 32, TINY["hidden_size"])))
    mx.eval(hidden, canvas)
    return hidden, canvas


def differs(one: mx.array, other: mx.array) -> float:
    return mx.abs(one - other).max().item()


@pytest.mark.parametrize("towers", ["shared", "separate", "decoder"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_changes_nothing_and_taking_it_out_leaves_the_same_model(model, kind, towers):
    before = states(model)
    names = [name for name, _ in tree_flatten(model.parameters())]
    keys = keys_of(["all-linear"]) if kind == "dora" else EVERYTHING
    put_in(model, AdapterConfig(kind, keys=keys, towers=towers))
    assert len(list(adapted(model.model.decoder))) > 40
    for old, new in zip(before, states(model), strict=True):
        assert differs(old, new) < 2e-5
    take_out(model)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    for old, new in zip(before, states(model), strict=True):
        assert mx.array_equal(old, new)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapted_layer_computes_with_its_merged_weight(model, kind):
    keys = keys_of(["all-linear"]) if kind == "dora" else EVERYTHING
    model.use_adapter(random_adapter(model, AdapterConfig(kind, rank=4, scale=1.5, keys=keys)))
    with_adapter = states(model)
    for owner, name, layer in list(adapted(model.model.decoder)):
        merged = layer.linear
        merged.weight = layer.merged()
        owner[name] = merged
    for one, other in zip(with_adapter, states(model), strict=True):
        assert differs(one, other) < 1e-4 * mx.abs(one).max().item()


def test_towers_are_adapted_as_asked(model):
    bare = states(model)
    model.use_adapter(random_adapter(model, AdapterConfig(towers="decoder")))
    hidden, canvas = states(model)
    assert mx.array_equal(hidden, bare[0]) and differs(canvas, bare[1]) > 0.01
    shared = random_adapter(model, AdapterConfig())
    model.use_adapter(shared)
    alike = states(model)
    assert differs(alike[0], bare[0]) > 0.01
    # The same arrays in both towers compute what shared ones do; others in the encoder change it.
    encoder = {name.replace("model.decoder", "model.encoder.language_model"): a for name, a in shared.arrays.items()}
    model.use_adapter(Adapter(AdapterConfig(towers="separate"), {**shared.arrays, **encoder}))
    for one, other in zip(alike, states(model), strict=True):
        assert mx.array_equal(one, other)
    other = {name: -array if name.endswith("lora_b") else array for name, array in encoder.items()}
    model.use_adapter(Adapter(AdapterConfig(towers="separate"), {**shared.arrays, **other}))
    assert differs(states(model)[0], alike[0]) > 0.01
    model.use_adapter(None)
    for one, other in zip(bare, states(model), strict=True):
        assert mx.array_equal(one, other)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_dense_weights_are_what_quantized_layers_compute_with(mode):
    linear = nn.QuantizedLinear(64, 32, bias=False, mode=mode, group_size=None, bits=None)
    x = mx.random.normal((5, 64))
    assert differs(linear(x), x @ dense_weight(linear).T) < 1e-5


def test_an_adapter_comes_back_from_its_files(model, tmp_path):
    adapter = random_adapter(model, AdapterConfig("dora", rank=3, scale=0.5, num_layers=2, towers="separate"))
    save_adapter(tmp_path / "a", adapter)
    again = load_adapter(tmp_path / "a")
    assert again.config == adapter.config
    assert all(mx.array_equal(again.arrays[name], array) for name, array in adapter.arrays.items())
    layers = {name.split(".")[3] for name in adapter.arrays if name.startswith("model.decoder")}
    assert layers == {"4", "5"}


def test_load_takes_an_adapter(demo_float32, tmp_path):
    model, _ = load(demo_float32)
    config = AdapterConfig(rank=2)
    adapter = random_adapter(model, config)
    save_adapter(tmp_path, adapter)
    adapted_model, _ = load(demo_float32, adapter=tmp_path)
    model.use_adapter(adapter)
    assert mx.array_equal(states_of_demo(model), states_of_demo(adapted_model))


def states_of_demo(model) -> mx.array:
    return model.encode(TOKENS, model.make_cache())


def test_whole_weights_are_used_and_given_back(model):
    before = states(model)
    arrays = {name: array * 1.1 for name, array in tree_flatten(model.parameters())}
    model.use_adapter(Adapter(AdapterConfig("full"), arrays))
    assert differs(states(model)[0], before[0]) > 0.01
    model.use_adapter(None)
    for one, other in zip(before, states(model), strict=True):
        assert mx.array_equal(one, other)


def test_wrong_adapters_are_refused_in_a_sentence(model, tmp_path):
    adapter = random_adapter(model, AdapterConfig())
    name = next(iter(adapter.arrays))
    without = {other: array for other, array in adapter.arrays.items() if other != name}
    for arrays, reason in (
        (without, f"{name} is missing"),
        ({**adapter.arrays, "x.lora_a": mx.zeros(2)}, "x.lora_a is not part of it"),
        ({**adapter.arrays, name: mx.zeros((1, 2))}, r"is \[1, 2\] instead of"),
    ):
        with pytest.raises(AdapterError, match=reason):
            model.use_adapter(Adapter(AdapterConfig(), arrays))
        assert not trained_arrays(model)
    with pytest.raises(AdapterError, match="no form for experts"):
        put_in(model, AdapterConfig("dora", keys=GROUPS["experts"]))
    with pytest.raises(AdapterError, match=r"'lm_head' is no linear layer"):
        keys_of(["lm_head"])
    with pytest.raises(AdapterError, match=r"has no adapter_config.json"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "soup"}))
    with pytest.raises(AdapterError, match="does not describe an adapter"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(tmp_path)
