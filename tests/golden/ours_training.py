"""This project's losses and gradients for a case of `make_training`: the same quantities as `make_training.measure`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from golden import ours
from golden.make_training import LOSSES, Draws, TrainingCase
from mlx.utils import tree_flatten

from mlx_diffusiongemma.model.adapters import TRAINED, AdapterConfig, put_in, trained_arrays
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffusiongemma.training.draws import Batch, Drawn
from mlx_diffusiongemma.training.loss import diffusion_loss

BUFFERS = ("std_bias", "std_scale")  # of the published vision tower, where they are no parameters


def batch(draws: Sequence[Draws], *, mask_prompt: bool = False) -> Batch:
    return Batch.of([Drawn(**vars(drawn)) for drawn in draws], mask_prompt=mask_prompt)


def measure(case: TrainingCase, draws: Sequence[Draws] | None = None, **options: Any) -> dict[str, np.ndarray]:
    """draws: the batch, by default the case's own. options: of `diffusion_loss`. The vision tower's gradients are there
    where there are images.
    """
    draws = case.draws if draws is None else draws
    given = batch(draws, mask_prompt=case.mask_prompt)
    tower = ours.vision(case)
    model = ours.build(case, lambda: tower)
    trained = {"": model.parameters()}
    if any(drawn.images for drawn in draws):
        trained[ours.VISION] = tower.parameters()

    def loss(parameters: dict[str, Any]) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        model.update(parameters[""])
        tower.update(parameters.get(ours.VISION, {}))
        denoising, next_token = diffusion_loss(model, given, **options)
        return denoising + next_token, (denoising, next_token)

    (_, losses), gradients = mx.value_and_grad(loss)(trained)
    out = {
        ours.published_name(prefix + name): np.array(array)
        for prefix, tree in gradients.items()
        for name, array in tree_flatten(tree)
        if not name.endswith(BUFFERS)
    }
    return out | {name: np.array(each) for name, each in zip(LOSSES, losses, strict=True)}


def gradients(model: DiffusionGemma, given: Batch, **options: Any) -> dict[str, mx.array]:
    """The gradient of the losses' sum with respect to what the model trains, by name."""

    def loss(parameters: dict[str, Any]) -> mx.array:
        model.update(parameters)
        denoising, next_token = diffusion_loss(model, given, **options)
        return denoising + next_token

    trained = model.trainable_parameters()
    made = dict(tree_flatten(mx.grad(loss)(trained)))
    mx.eval(made)
    model.update(trained)  # the function's own arrays are still in it
    return made


def adapted(model: DiffusionGemma, config: AdapterConfig) -> DiffusionGemma:
    """The model, of which an adapter that does change something is all that is trained."""
    model.freeze()
    put_in(model, config)
    random = np.random.default_rng(3)
    for name, array in trained_arrays(model).items():
        noise = mx.array(0.1 * random.standard_normal(array.shape), mx.float32)
        model.load_weights([(name, array * (1 + noise) if name.endswith(".m") else noise)], strict=False)
    model.unfreeze(keys=list(TRAINED))
    return model
