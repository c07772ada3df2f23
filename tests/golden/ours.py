"""This project's model of a case, and what it computes: the same quantities as `reference.run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffusiongemma.model.vision import VisionModel

if TYPE_CHECKING:
    from cases import Case

VISION = "model.encoder."  # what the names of the vision tower's weights begin with where they are published


def build(case: Case, load_vision: Callable[[], VisionModel] | None = None) -> DiffusionGemma:
    """The case's model with its weights."""
    model = DiffusionGemma(ModelConfig.from_dict(case.config), load_vision=load_vision)
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    model.load_weights([(name, mx.array(case.weight(published_name(name), shape))) for name, shape in shapes.items()])
    return model


def vision(case: Case) -> VisionModel:
    """The case's vision tower with its weights, for `build`."""
    config = ModelConfig.from_dict(case.config)
    tower = VisionModel(config.vision, config.text.hidden_size)
    shapes = {name: array.shape for name, array in tree_flatten(tower.parameters())}
    tower.load_weights([(name, mx.array(case.weight(VISION + name, shape))) for name, shape in shapes.items()])
    return tower


def published_name(name: str) -> str:
    """The published layout's stacks of experts have no `.weight`."""
    return name.removesuffix(".weight") if ".experts." in name else name


def run(model: DiffusionGemma, case: Case, reference_logits: np.ndarray) -> dict[str, np.ndarray]:
    """A prompt, two denoising steps, a commit and the next canvas. The second step is conditioned on the reference's
    logits, so that what the first step is off by does not count twice.
    """
    tokens = {name: mx.array(case.tokens(name)) for name in ("prompt", "first", "second", "commit", "next")}
    cache = model.make_cache()
    out = {"encoded": model.encode(tokens["prompt"], cache)}
    kinds = [layer.kind for layer in model.config.text.layers]
    for kind in set(kinds):
        layer = cache.layers[kinds.index(kind)]
        visible = slice(layer.length - layer.visible, layer.length)
        out[f"{kind} keys"], out[f"{kind} values"] = (array[:, :, visible] for array in layer.buffers)
    out["logits"] = model.logits(model.denoise(tokens["first"], cache))
    conditioning = model.soft_embedding(mx.array(case.processed(reference_logits)))
    out["conditioned logits"] = model.logits(model.denoise(tokens["second"], cache, conditioning))
    out["encoded commit"] = model.encode(tokens["commit"], cache)
    out["next logits"] = model.logits(model.denoise(tokens["next"], cache))
    return {name: np.array(array) for name, array in out.items()}
