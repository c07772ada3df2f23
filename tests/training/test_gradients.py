"""Gradients, against each other and against differences of the loss: whatever is computed again, in blocks, beside
quantized weights or through adapters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from golden import make_training, ours
from golden.make_training import CASES, Example, TrainingCase
from golden.ours_training import adapted, batch, gradients
from mlx.utils import tree_flatten

from mlx_diffusiongemma.model import adapters, vocabulary
from mlx_diffusiongemma.model.adapters import AdapterConfig, dense_weight, keys_of, trained_arrays
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffusiongemma.model.scaled import ScaledQuantizedLinear, add_tensor_scales
from mlx_diffusiongemma.training import loss as training_loss
from mlx_diffusiongemma.training.cross_entropy import cross_entropy
from mlx_diffusiongemma.training.forward import encode
from mlx_diffusiongemma.training.loss import diffusion_loss

EVERYWHERE = keys_of(("all-linear", "experts"))
# Sizes that every quantization divides.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "global_head_dim": 32,
    "num_experts": 4,
}
FORMATS = [*((bits, "affine", 32) for bits in (3, 4, 5, 6, 8)), (4, "mxfp4", 32), (4, "nvfp4", 16), (8, "mxfp8", 32)]

by_name = {case.name: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_format = pytest.mark.parametrize(("bits", "mode", "group"), FORMATS, ids=lambda value: str(value))


def wide_case() -> TrainingCase:
    """Two canvases and a prompt beyond the window, self-conditioned: everything that a gradient can pass through."""
    example = Example((2 * make_training.WINDOW + 3,), reply=14, drawn=1, conditioned=True)
    return replace(by_name["the first canvas"], name="wide", examples=(example,), text=WIDE)


def build(case: TrainingCase) -> DiffusionGemma:
    tower = ours.vision(case)
    return ours.build(case, lambda: tower)


def assert_close(made: dict[str, mx.array], expected: dict[str, mx.array], tolerance: float = 1e-5) -> None:
    """tolerance: of each gradient's norm, or of a hundredth of all gradients' where that is more."""
    assert made.keys() == expected.keys()
    least = 0.01 * np.sqrt(sum(float(mx.square(array).sum()) for array in expected.values()))
    for name, array in expected.items():
        off = float(mx.linalg.norm((made[name] - array).flatten()))
        norm = max(float(mx.linalg.norm(array.flatten())), least)
        assert off <= tolerance * norm, f"{name}: off by {off / norm:.1e} of its norm"


# What a loss depends on


@pytest.mark.parametrize("name", ["the first canvas", "the middle canvas, self-conditioned", "an image"])
def test_what_comes_after_the_canvas_changes_nothing_in_its_loss(name):
    """Not a bit."""
    case = by_name[name]
    model, drawn = build(case), case.draws[0]
    stop = drawn.start + case.canvas
    assert stop < len(drawn.tokens)
    others = tuple((token + 7) % 50 for token in drawn.tokens[stop:])
    changed = replace(drawn, tokens=drawn.tokens[:stop] + others)
    before, after = (diffusion_loss(model, batch([each])) for each in (drawn, changed))
    assert before[0].item() == after[0].item()
    assert before[1].item() != after[1].item()


@pytest.mark.parametrize("name", ["the first canvas", "the middle canvas, self-conditioned", "an image"])
def test_what_comes_before_the_canvas_changes_its_loss(name):
    case = by_name[name]
    model, drawn = build(case), case.draws[0]
    changed = replace(drawn, tokens=((drawn.tokens[0] + 7) % 50, *drawn.tokens[1:]))
    before, after = (diffusion_loss(model, batch([each])) for each in (drawn, changed))
    assert before[0].item() != after[0].item()


# Checkpoints


@each_case
def test_checkpointed_gradients_equal_plain_ones(case):
    given = batch(case.draws)
    assert_close(gradients(build(case), given, checkpoint=True), gradients(build(case), given), 1e-6)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("towers", ["shared", "separate", "decoder"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_checkpointed_gradients_of_adapters_equal_plain_ones(kind, towers, checkpoint):
    case = by_name["two rows of different lengths"]
    config = AdapterConfig(kind, rank=3, towers=towers, keys=keys_of(("all-linear",)))
    made = gradients(adapted(build(case), config), batch(case.draws), checkpoint=checkpoint)
    assert made.keys() == trained_arrays(adapted(build(case), config)).keys()
    assert all(bool(mx.any(array != 0)) for array in made.values())
    if checkpoint:
        assert_close(made, gradients(adapted(build(case), config), batch(case.draws)), 1e-6)


@pytest.mark.parametrize("checkpoint", [False, True])
@each_case
def test_the_denoising_loss_reaches_the_encoder(case, checkpoint):
    """Through keys and values alone: an adapter of the encoder's own has no other way to it, and what comes after the
    last layer's keys and values none at all.
    """
    model = adapted(build(case), AdapterConfig(rank=2, towers="separate"))
    trained = model.trainable_parameters()

    def denoising(parameters):
        model.update(parameters)
        return diffusion_loss(model, batch(case.draws), checkpoint=checkpoint)[0]

    made = {name: array for name, array in tree_flatten(mx.grad(denoising)(trained)) if ".encoder." in name}
    last = f".layers.{len(case.layers) - 1}."
    reaching = {name for name in made if last not in name or "k_proj" in name or "v_proj" in name}
    assert reaching and reaching == {name for name, array in made.items() if bool(mx.any(array != 0))}


# Adapters


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_shared_adapter_learns_from_both_towers(kind):
    """Its gradient is the sum of what two equal adapters, one of each tower, would get."""
    case = by_name["the middle canvas, self-conditioned"]
    config = AdapterConfig(kind, rank=3, keys=keys_of(("attention", "mlp", "router")))
    shared, separate = adapted(build(case), config), adapted(build(case), replace(config, towers="separate"))
    for name, array in trained_arrays(shared).items():
        separate.load_weights([(name, array), (in_encoder(name), array)], strict=False)
    together, apart = (gradients(model, batch(case.draws)) for model in (shared, separate))
    assert_close(together, {name: apart[name] + apart[in_encoder(name)] for name in together})


def in_encoder(name: str) -> str:
    return name.replace("model.decoder.", "model.encoder.language_model.")


@pytest.mark.parametrize("keys", [EVERYWHERE, keys_of(("all-linear",))], ids=["lora", "dora"])
def test_gradients_of_adapters_are_differences_of_the_loss(keys, monkeypatch):
    """The largest entry and another, of arrays of every kind. What is published as a constant to the gradient is held
    while they change: DoRA's lengths, and what the first pass believes. Every expert is chosen: a choice is no smooth
    function.
    """
    case = wide_case()
    case = replace(case, text=case.text | {"top_k_experts": 4})
    kind = "lora" if keys == EVERYWHERE else "dora"
    model, given = adapted(build(case), AdapterConfig(kind, rank=2, keys=keys)), batch(case.draws)
    made = gradients(model, given)
    lengths = {id(layer): layer._lengths() for _, _, layer in adapters.adapted(model) if kind == "dora"}
    believed = training_loss._conditioning(model, given, encode(model, given, False)[1])
    monkeypatch.setattr(training_loss, "_conditioning", lambda *_: believed)
    if lengths:
        monkeypatch.setattr(adapters.LowRankDirection, "_lengths", lambda layer: lengths[id(layer)])
    arrays = {name: np.array(array) for name, array in trained_arrays(model).items()}

    def loss(name: str, place: tuple[int, ...], step: float) -> float:
        moved = arrays[name].copy()
        moved[place] += step
        model.load_weights([(name, mx.array(moved))], strict=False)
        total = sum(each.item() for each in diffusion_loss(model, given))
        model.load_weights([(name, mx.array(arrays[name]))], strict=False)
        return total

    step = 0.02
    noise = 4e-7 * loss(next(iter(arrays)), (0, 0), 0) / step  # a few last places of the loss
    seen = 0
    some = sorted(made)[::5]
    assert {name.rpartition(".")[2] for name in some} == {name.rpartition(".")[2] for name in made}
    for name in some:
        array = made[name]
        flat = np.abs(np.array(array)).ravel()
        for number in (int(flat.argmax()), flat.size // 2):
            place = np.unravel_index(number, array.shape)
            near, far = (loss(name, place, by) - loss(name, place, -by) for by in (step, 2 * step))
            difference = (8 * near - far) / (12 * step)
            assert difference == pytest.approx(float(np.array(array)[place]), rel=1e-3, abs=noise), (name, place)
            seen += abs(difference) > 10 * noise
    assert seen > len(some) / 2  # many are well above what float32 hides


# Quantized bases


def quantized(case: TrainingCase, bits: int, mode: str, group: int) -> DiffusionGemma:
    model = build(case)
    affine = {"group_size": 32, "bits": 8, "mode": "affine"}  # which the other modes' checkpoints have here

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return hasattr(module, "to_quantized") and (not path.endswith("embed_tokens") or affine)

    nn.quantize(model, group, bits, mode=mode, class_predicate=settings)
    return model


def dequantized(model: DiffusionGemma, case: TrainingCase) -> DiffusionGemma:
    """The model that computes the same with dense weights."""
    dense = build(case)
    weights = [(f"{path}.weight", dense_weight(module)) for path, module in model.named_modules() if "scales" in module]
    assert any("embed_tokens" in name for name, _ in weights) and any("experts" in name for name, _ in weights)
    dense.load_weights(weights, strict=False)
    return dense


@each_format
def test_gradients_beside_quantized_weights(bits, mode, group):
    case = wide_case()
    base = quantized(case, bits, mode, group)
    dense = dequantized(base, case)
    config = AdapterConfig(rank=3, keys=EVERYWHERE)
    made, expected = (gradients(adapted(model, config), batch(case.draws)) for model in (base, dense))
    assert_close(made, expected)


@each_format
def test_dora_gradients_beside_quantized_weights(bits, mode, group):
    """The lengths of rows are those of the quantized weight."""
    case = wide_case()
    base = quantized(case, bits, mode, group)
    dense = dequantized(base, case)
    config = AdapterConfig("dora", rank=3, keys=keys_of(("all-linear",)))
    made, expected = (gradients(adapted(model, config), batch(case.draws)) for model in (base, dense))
    assert_close(made, expected)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_beside_weights_with_a_tensor_scale(kind):
    case = wide_case()
    base = quantized(case, 4, "nvfp4", 16)
    shapes = {
        f"{path}.weight_scale_2": module.weight.shape[:-2]
        for path, module in base.named_modules()
        if "scales" in module and ".layers." in path
    }
    add_tensor_scales(base, shapes)
    scaled = [module for module in base.modules() if "weight_scale_2" in module]
    assert any(isinstance(module, ScaledQuantizedLinear) for module in scaled)
    for number, module in enumerate(scaled):
        module.weight_scale_2 = module.weight_scale_2 * (0.8 + 0.4 * (number % 5) / 5)
    keys = EVERYWHERE if kind == "lora" else keys_of(("all-linear",))
    config = AdapterConfig(kind, rank=3, keys=keys)
    dense = dequantized(base, case)
    made, expected = (gradients(adapted(model, config), batch(case.draws)) for model in (base, dense))
    assert_close(made, expected)


# The vocabulary

VOCABULARY, ROWS, HIDDEN, CAP = 262_144, 64, 16, 30.0


def dense_cross_entropy(embedding: nn.Embedding, hidden: mx.array, targets: mx.array, cap: float) -> mx.array:
    return nn.losses.cross_entropy(vocabulary.logits(embedding, hidden, cap), targets)


def true_vocabulary() -> tuple[nn.Embedding, mx.array, mx.array, mx.array]:
    """An embedding of the true size, hidden states, targets at both its ends and between, and each one's weight."""
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    embedding.weight = mx.random.normal((VOCABULARY, HIDDEN), key=mx.random.key(0))
    hidden = 3 * mx.random.normal((ROWS, HIDDEN), key=mx.random.key(1))
    between = mx.random.randint(0, VOCABULARY, (ROWS - 2,), key=mx.random.key(3))
    targets = mx.concatenate([mx.array([0, VOCABULARY - 1]), between])
    weights = mx.random.uniform(0, 1, (ROWS,), key=mx.random.key(2))
    mx.eval(embedding.parameters(), hidden, targets, weights)
    return embedding, hidden, targets, weights


def test_cross_entropy_in_blocks_is_right_at_the_true_vocabulary():
    """Against float64: MLX's own sum over so many logits is off by more than the sum over blocks."""
    embedding, hidden, targets, weights = true_vocabulary()
    exact, to_weight, to_hidden = in_float64(embedding, hidden, targets, weights)

    def loss(weight: mx.array, hidden: mx.array) -> tuple[mx.array, mx.array]:
        embedding.weight = weight
        losses = cross_entropy(embedding, hidden, targets, CAP)
        return (losses * weights).sum(), losses

    (_, losses), made = mx.value_and_grad(loss, argnums=(0, 1))(embedding.weight, hidden)
    np.testing.assert_allclose(losses, exact, rtol=1e-6)
    for gradient, expected in zip(made, (to_weight, to_hidden), strict=True):
        assert np.linalg.norm(np.array(gradient) - expected) <= 3e-6 * np.linalg.norm(expected)


def in_float64(embedding: nn.Embedding, hidden: mx.array, targets: mx.array, weights: mx.array) -> list[np.ndarray]:
    """The losses, and the gradients of their weighted sum with respect to the embedding's weight and `hidden`."""
    table, rows, weights = (np.array(array).astype(np.float64) for array in (embedding.weight, hidden, weights))
    logits = CAP * np.tanh(rows @ table.T / CAP)
    exponentials = np.exp(logits - CAP)  # no logit is above the cap
    slope = exponentials / exponentials.sum(1, keepdims=True)
    place = (np.arange(ROWS), np.array(targets))
    losses = -np.log(slope[place])
    slope[place] -= 1
    slope *= weights[:, None] * (1 - (logits / CAP) ** 2)
    return [losses, slope.T @ rows, slope @ table]


@pytest.mark.parametrize("frozen", [True, False])
def test_cross_entropy_needs_an_eighth_of_the_dense_ones_memory(frozen):
    """At the true vocabulary, beside the embedding and its gradient."""
    embedding, hidden, targets, weights = true_vocabulary()
    if frozen:
        embedding.freeze()
    trained = embedding.trainable_parameters()

    def peak(form) -> int:
        def loss(parameters: dict[str, mx.array], hidden: mx.array) -> mx.array:
            embedding.update(parameters)
            return (form(embedding, hidden, targets, CAP) * weights).sum()

        mx.clear_cache()
        before = mx.get_active_memory() + sum(array.nbytes for array in trained.values())
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss, argnums=(0, 1))(trained, hidden))
        return mx.get_peak_memory() - before

    assert peak(cross_entropy) <= peak(dense_cross_entropy) / 8
