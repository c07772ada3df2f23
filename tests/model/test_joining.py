"""A fused model computes with the weights that it has, whoever changed them and however."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.lora import LoRALinear
from random_models import config_json, random_model

from mlx_diffusiongemma.config import FULL, SLIDING
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffusiongemma.model.joining import fusible

CANVAS = 16
LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
each_width = pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4-bit"])


def build(bits: int | None = None, dtype: mx.Dtype = mx.float32) -> DiffusionGemma:
    return random_model(config_json([SLIDING, FULL], CANVAS), bits, dtype)


def joined(model: DiffusionGemma) -> list[bool]:
    return [module._joined is not None for module in fusible(model)]


def hidden(model: DiffusionGemma) -> np.ndarray:
    cache = model.make_cache()
    encoded = model.encode(mx.arange(20)[None], cache)
    soft = mx.random.normal((1, CANVAS, 64), key=mx.random.key(1)).astype(encoded.dtype)
    canvas = mx.arange(CANVAS)[None] * 3
    return np.array(mx.concatenate([encoded, model.denoise(canvas, cache, soft)], axis=1).astype(mx.float32))


def parent_of(model: DiffusionGemma, name: str) -> tuple[nn.Module, str]:
    """The module of the first layer that has the linear layer `name`, and its name there."""
    part, _, last = name.rpartition(".")
    return model.model.decoder.layers[0][part], last


def ramp(array: mx.array) -> mx.array:
    """Another factor for each row: the norms behind would take out a common one."""
    return mx.linspace(0.5, 2, len(array))[:, None]


def changed(array: mx.array) -> mx.array:
    return array * ramp(array)


def assign(parent, name):
    parent[name].weight = changed(parent[name].weight)


def augment(parent, name):
    parent[name].weight *= ramp(parent[name].weight)


def update(parent, name):
    parent.update({name: {"weight": changed(parent[name].weight)}})


def load_weights(parent, name):
    parent.load_weights([(f"{name}.weight", changed(parent[name].weight))], strict=False)


def apply(parent, name):
    parent[name].apply(changed)


def replace_layer(parent, name):
    rows, columns = parent[name].weight.shape
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = changed(parent[name].weight)
    parent[name] = linear


def replace_by_adapter(parent, name):
    adapter = LoRALinear.from_base(parent[name], r=4)
    for number, array in enumerate(("lora_a", "lora_b")):
        adapter[array] = mx.random.normal(adapter[array].shape, key=mx.random.key(number))
    parent.update_modules({name: adapter})


def add_bias(parent, name):
    parent[name].bias = mx.ones(parent[name].weight.shape[0])


def quantize(parent, name):
    nn.quantize(parent, group_size=32, bits=4, class_predicate=lambda path, _: path == name)


def quantize_all(parent, name):
    nn.quantize(parent, group_size=32, bits=8)


CHANGES = [
    assign,
    augment,
    update,
    load_weights,
    apply,
    replace_layer,
    replace_by_adapter,
    add_bias,
    quantize,
    quantize_all,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_every_change_of_a_fused_layer_has_its_effect(name, change):
    model, fused = build(), build()
    fused.fuse()
    before = hidden(fused)
    for each in (model, fused):
        change(*parent_of(each, name))
    expected, made = hidden(model), hidden(fused)
    assert np.abs(expected - before).max() > 1e-3 * np.abs(before).max()
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    fused.fuse()
    np.testing.assert_allclose(hidden(fused), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def scale(parent, name):
    parent[name].scales = changed(parent[name].scales)


@pytest.mark.parametrize("change", [scale, replace_by_adapter, add_bias])
@pytest.mark.parametrize("name", LAYERS)
def test_every_change_of_a_fused_quantized_layer_has_its_effect(name, change):
    model, fused = build(4), build(4)
    fused.fuse()
    before = hidden(fused)
    for each in (model, fused):
        change(*parent_of(each, name))
    expected = hidden(model)
    assert np.abs(expected - before).max() > 1e-3 * np.abs(before).max()
    np.testing.assert_allclose(hidden(fused), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@each_width
def test_a_change_undoes_one_join_and_no_other(bits):
    model = build(bits)
    model.fuse()
    assert all(joined(model)) and len(joined(model)) == 5
    replace_by_adapter(*parent_of(model, "self_attn.v_proj"))
    hidden(model)
    assert joined(model).count(False) == 1


@each_width
def test_walks_over_modules_find_what_they_found(bits):
    model = build(bits)
    walks = {
        "modules": lambda: sorted(name for name, _ in model.named_modules()),
        "leaves": lambda: sorted(name for name, _ in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)),
        "parameters": lambda: sorted(name for name, _ in tree_flatten(model.parameters())),
        "trainable": lambda: sorted(name for name, _ in tree_flatten(model.trainable_parameters())),
    }
    before = {name: walk() for name, walk in walks.items()}
    values = tree_map(lambda array: mx.array(array), model.parameters())
    model.fuse()
    assert {name: walk() for name, walk in walks.items()} == before
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(array, after[name]) for name, array in tree_flatten(values))


@pytest.mark.parametrize(("bits", "dtype"), [(None, mx.float32), (4, mx.float32), (4, mx.bfloat16)])
def test_fusing_and_undoing_it_change_no_number(bits, dtype):
    model = build(bits, dtype)
    plain = hidden(model)
    model.fuse()
    fused = hidden(model)
    assert all(joined(model))
    model.unfuse()
    assert not any(joined(model))
    np.testing.assert_array_equal(hidden(model), plain)
    np.testing.assert_allclose(fused, plain, rtol=0, atol=2e-6 * np.abs(plain).max())


def test_a_joined_weight_does_not_change_in_place_until_it_is_free():
    model = build()
    model.fuse()
    weight = model.model.decoder.layers[0].mlp.up_proj.weight
    with pytest.raises(TypeError, match="unfuse"):
        weight[0] = 1
    model.unfuse()
    before = hidden(model)
    weight[0] = 1
    assert not np.array_equal(hidden(model), before)


def test_nothing_is_stored_twice():
    model = build()
    mx.eval(model)
    held = mx.get_active_memory()
    model.fuse()
    mx.eval(model)
    assert mx.get_active_memory() == pytest.approx(held, rel=0.01)
    model.fuse()
    model.unfuse()
    mx.eval(model)
    assert mx.get_active_memory() == pytest.approx(held, rel=0.01)


def test_gradients_pass_through_the_layers_themselves():
    def gradients(model: DiffusionGemma) -> dict[str, mx.array]:
        layer, x = model.model.decoder.layers[0], mx.random.normal((1, 8, 64), key=mx.random.key(3))
        whole = lambda: layer.self_attn(x, lambda k, v: (k, v), 0, None).sum() + layer.mlp(x).square().sum()  # noqa: E731
        return dict(tree_flatten(nn.value_and_grad(layer, whole)()[1]))

    model, fused = build(), build()
    fused.fuse()
    expected, made = gradients(model), gradients(fused)
    assert expected.keys() == made.keys()
    for name in LAYERS:
        assert mx.abs(expected[f"{name}.weight"]).max() > 0
        assert mx.allclose(expected[f"{name}.weight"], made[f"{name}.weight"], rtol=1e-5, atol=1e-5)


def test_a_copy_is_not_fused():
    model = build()
    model.fuse()
    twin = copy.deepcopy(model)
    twin.model.decoder.layers[0].mlp.up_proj.weight[0] = 1
    assert not any(joined(twin)) and all(joined(model))
    assert not np.array_equal(hidden(twin), hidden(model))


def test_layers_that_are_stored_differently_are_not_joined():
    for change in (quantize, add_bias, replace_by_adapter):
        model = build()
        change(*parent_of(model, "self_attn.q_proj"))
        expected = hidden(model)
        model.fuse()
        assert joined(model).count(False) == 1
        np.testing.assert_allclose(hidden(model), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    model = build()
    projection = model.model.decoder.layers[0].mlp.up_proj
    projection.weight = projection.weight.astype(mx.float16)
    model.fuse()
    assert joined(model).count(False) == 1 and projection.weight.dtype == mx.float16
