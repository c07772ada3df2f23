"""Prompts with images, end to end, against Transformers' `generate`: stored float64 values everywhere, and the live
model where PyTorch is installed.
"""

from __future__ import annotations

import importlib.util

import mlx.core as mx
import numpy as np
import pytest
from golden import make_images, ours
from golden.cases import TEMPERATURE, WINDOW
from golden.make_images import CASES, DEMO_CASES, PATH, demo_canvas, demo_messages, demo_pictures, kept

from mlx_diffusiongemma import load
from mlx_diffusiongemma.model import diffusion_gemma
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma

TOLERANCE = 5e-5  # of the largest value

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_demo = pytest.mark.parametrize("name", DEMO_CASES)
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(PATH) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def of_case(golden: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}/"): array for key, array in golden.items() if key.startswith(f"{name}/")}


def build(case) -> DiffusionGemma:
    """This project's model of a case, its vision tower read at the first image."""
    return ours.build(case, lambda: ours.vision(case))


def run(model: DiffusionGemma, tokens, pictures, canvas, reference_logits=None) -> dict[str, np.ndarray]:
    """What `make_images._run` computes; the second step is conditioned on the reference's logits."""
    cache = model.make_cache()
    out = {"encoded": model.encode(mx.array(tokens), cache, pictures)}
    kinds = [layer.kind for layer in model.config.text.layers]
    for kind in set(kinds):
        layer = cache.layers[kinds.index(kind)]
        visible = slice(layer.length - layer.visible, layer.length)
        out[f"{kind} keys"], out[f"{kind} values"] = (array[:, :, visible] for array in layer.buffers)
    first = mx.array(canvas)
    out["logits"] = model.logits(model.denoise(first, cache))
    given = out["logits"] if reference_logits is None else mx.array(reference_logits)
    conditioning = model.soft_embedding(given / TEMPERATURE)
    out["conditioned logits"] = model.logits(model.denoise(first, cache, conditioning))
    return {name: np.array(array) for name, array in out.items()}


def assert_close(made: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> None:
    assert made.keys() == exact.keys()
    for name, expected in exact.items():
        assert made[name].shape == expected.shape, name
        error = np.abs(made[name] - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCE, f"{name}: off by {error:.2e} of the largest value"


# The last one is one chunk; the others end before, inside and after images.
@pytest.mark.parametrize("chunk", [1, 3, 5, WINDOW - 1, WINDOW, WINDOW + 1, 16, 1024])
@each_case
def test_equals_the_stored_reference(case, chunk, golden, monkeypatch):
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", chunk)
    exact = of_case(golden, case.name)
    assert_close(run(build(case), case.tokens("prompt"), case.pictures, case.tokens("first"), exact["logits"]), exact)


@needs_torch
@each_case
def test_equals_transformers(case):
    exact = make_images.seeded(case)
    assert_close(run(build(case), case.tokens("prompt"), case.pictures, case.tokens("first"), exact["logits"]), exact)


def test_images_change_what_is_compared():
    """Lest all this hold for a model that does not look."""
    case = CASES[0]
    seen = run(build(case), case.tokens("prompt"), case.pictures, case.tokens("first"))
    unseen = run(build(case), case.tokens("prompt"), [], case.tokens("first"))
    for name in ("encoded", "logits", "conditioned logits"):
        assert np.abs(seen[name] - unseen[name]).max() > 100 * TOLERANCE * np.abs(seen[name]).max()


@pytest.mark.parametrize("chunk", [40, 64, 75, 1024])
@each_demo
def test_the_demo_checkpoint_equals_the_stored_reference(demo, name, chunk, golden, monkeypatch):
    """From pictures and messages on. At 40, 64 and 75 tokens a chunk would end inside an image."""
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", chunk)
    model, processor = demo
    prompt = processor.prompt(demo_messages(name), images=demo_pictures(name))
    canvas = demo_canvas(name, model.config.canvas_length)
    made = run(model, [prompt.tokens], prompt.images, canvas)
    made.pop("conditioned logits")
    exact = of_case(golden, name)
    exact.pop("conditioned logits")
    assert_close({key: kept(key, array) for key, array in made.items()}, exact)


@needs_torch
@each_demo
def test_the_demo_checkpoint_equals_transformers(demo, name):
    model, processor = demo
    prompt = processor.prompt(demo_messages(name), images=demo_pictures(name))
    canvas = demo_canvas(name, model.config.canvas_length)
    exact = make_images.demo(prompt.tokens, list(prompt.images), canvas)
    assert_close(run(model, [prompt.tokens], prompt.images, canvas, exact["logits"]), exact)
