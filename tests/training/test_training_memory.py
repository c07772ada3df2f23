"""The memory that training is said to need, beside what MLX uses, and the sentence where there is too little."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from convert_data import true_config, true_shapes
from mlx.utils import tree_flatten
from random_models import config_json, random_model, true_pattern

from mlx_diffusiongemma import ModelConfig, TrainingError
from mlx_diffusiongemma.checkpoints.safetensors import ITEM_BYTES
from mlx_diffusiongemma.model.adapters import ALL_LINEAR, AdapterConfig, trained_arrays
from mlx_diffusiongemma.training import TrainingOptions, diffusion_loss, memory
from mlx_diffusiongemma.training.data import Example
from mlx_diffusiongemma.training.draws import Batch, draw
from mlx_diffusiongemma.training.memory import check_memory, training_memory
from mlx_diffusiongemma.training.trainer import prepare

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "head_dim": 64,
    "global_head_dim": 128,
    "vocab_size": 512,
}
CANVAS = 64


def shapes(config, nbytes=0, item=4):
    """What stands for a checkpoint: its shapes."""
    return SimpleNamespace(config=config, nbytes=nbytes, item=item)


def true_checkpoint():
    nbytes = sum(math.prod(shape) * ITEM_BYTES[dtype] for _, shape, dtype in true_shapes("mlx_4bit"))
    return shapes(ModelConfig.from_dict(true_config()), nbytes, item=2)


def measured(model, options, prompt):
    """The most that MLX holds beside the model, for the gradient of one batch."""
    size, random = model.config.text.vocab_size, np.random.default_rng(0)
    tokens = [tuple(random.integers(2, size, count).tolist()) for count in (prompt, CANVAS)]
    drawn = [replace(draw(Example(*tokens), CANVAS, size, random), conditioned=True) for _ in range(options.batch_size)]
    batch = Batch.of(drawn)

    def loss(batch):
        return sum(diffusion_loss(model, batch, checkpoint=options.grad_checkpoint))

    gradient = nn.value_and_grad(model, loss)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(batch))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("layers", "prompt", "batch"), [(6, 64, 1), (6, 192, 1), (9, 64, 2)])
def test_it_is_about_what_is_used(layers, prompt, batch, again):
    model = random_model(config_json(true_pattern(layers), CANVAS, **WIDE), None)
    options = TrainingOptions(
        batch_size=batch, grad_checkpoint=again, optimizer="sgd", grad_accumulation_steps=1, max_seq_length=4096
    )
    prepare(model, options)
    mx.eval(model.parameters())
    said = training_memory(shapes(model.config), options, prompt + CANVAS)
    assert (said.total - said.weights) / measured(model, options, prompt) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(),
        AdapterConfig(keys=(*ALL_LINEAR, "experts"), rank=4),
        AdapterConfig(fine_tune_type="dora", towers="separate", num_layers=2),
    ],
)
def test_trained_weights_are_counted_exactly(adapter):
    model = random_model(config_json(true_pattern(6), CANVAS), None)
    options = TrainingOptions(adapter=adapter)
    prepare(model, options)
    trained = sum(array.nbytes for array in trained_arrays(model).values())
    said = training_memory(shapes(model.config, nbytes=1000), options)
    assert said.weights == 1000 + trained
    assert said.optimizer == trained * 4  # the gradient of a batch, their sum, two moments


def test_all_weights_are_trained_in_float32():
    model = random_model(config_json(true_pattern(6), CANVAS), None)
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    options = TrainingOptions(adapter=AdapterConfig("full"))
    for item in (2, 4):
        said = training_memory(shapes(model.config, nbytes * item // 4, item), options)
        assert (said.weights, said.optimizer) == (nbytes, 4 * nbytes)


def test_the_published_model_at_4_bits_trains_on_a_mac_of_32_gb():
    kept = training_memory(true_checkpoint(), TrainingOptions(), 512).total
    again = training_memory(true_checkpoint(), TrainingOptions(grad_checkpoint=True), 512).total
    assert 24e9 < kept < 28e9 and 17e9 < again < 20e9
    assert training_memory(true_checkpoint(), TrainingOptions(), 1024).total > kept
    longest = training_memory(true_checkpoint(), TrainingOptions(max_seq_length=257))
    assert longest == training_memory(true_checkpoint(), TrainingOptions(), 512)


@pytest.mark.parametrize(
    ("gigabytes", "options", "advice"),
    [
        (20, {}, "try --grad-checkpoint."),
        (28, {"batch_size": 2}, "try --grad-checkpoint."),
        (18, {"batch_size": 8}, "try --grad-checkpoint --batch-size 1."),
        (27, {"batch_size": 40, "grad_checkpoint": True}, "try --batch-size 1."),
        (12, {}, "try shorter examples (--max-seq-length) or a checkpoint with fewer bits."),
    ],
)
def test_too_little_memory_is_said_with_what_would_help(monkeypatch, gigabytes, options, advice):
    monkeypatch.setattr(memory, "usable_bytes", lambda: int(gigabytes * 1e9))
    with pytest.raises(TrainingError) as raised:
        check_memory(true_checkpoint(), TrainingOptions(**options), 512)
    assert str(raised.value).endswith(advice) and f"{gigabytes:.1f} GB can be used here" in str(raised.value)
    monkeypatch.setattr(memory, "usable_bytes", lambda: int(1e12))
    check_memory(true_checkpoint(), TrainingOptions(**options), 512)
