"""Far into the published model's 262,144 tokens: rotations, masks and positions are what they are at the beginning."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from golden import ours
from golden.cases import WINDOW, Case
from mlx.utils import tree_flatten

from mlx_diffusiongemma.config import DEFAULT_ROPE, FULL, SLIDING, LayerConfig, ModelConfig
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffusiongemma.model.layers import Attention

CONTEXT, CANVAS = 262_144, 16
# float32 knows an angle of 262,144 radians to within 0.016; the reference's are no better.
ANGLE = 0.016


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return ours.build(Case("far", "SF", prompt=1, canvas=CANVAS, text={"max_position_embeddings": CONTEXT}))


@pytest.mark.parametrize("offset", [0, 1023, 131_072, CONTEXT - 4])
@pytest.mark.parametrize(("kind", "head_dim"), [(SLIDING, 256), (FULL, 512)])
def test_rotations_are_the_references(model, kind, head_dim, offset):
    """At the published head sizes; float64 from the definition."""
    layer = LayerConfig(kind, head_dim, 1)
    config = replace(model.config.text, rope_parameters=DEFAULT_ROPE)
    given = mx.random.normal((1, 1, 4, head_dim), key=mx.random.key(0))
    made = np.array(Attention(config, layer).rope(given, offset=offset))[0, 0]
    half = head_dim // 2
    turning = half if kind == SLIDING else half // 4
    frequencies = np.zeros(half)
    frequencies[:turning] = DEFAULT_ROPE[kind]["rope_theta"] ** (-np.arange(turning) / half)
    angles = (offset + np.arange(4))[:, None] * frequencies
    first, second = np.split(np.array(given, np.float64)[0, 0], 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    expected = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    lengths = np.hypot(first, second)
    assert np.abs(made - expected).max() <= (2 * ANGLE * offset / CONTEXT + 1e-5) * lengths.max()


@pytest.mark.parametrize("offset", [0, WINDOW - 1, WINDOW, CONTEXT - 3 * CANVAS])
@pytest.mark.parametrize("blocks", [[], [(2, 14)]])
def test_masks_are_by_definition(model, offset, blocks):
    cache = model.make_cache()
    cache.offset = offset
    for kind, window in ((SLIDING, WINDOW), (FULL, CONTEXT)):
        before = min(offset, window - 1)
        queries, keys = offset + np.arange(CANVAS)[:, None], offset - before + np.arange(before + CANVAS)[None]
        expected = (keys <= queries) & (keys > queries - window)
        for first, last in blocks:
            of_image = (keys >= offset + first) & (keys < offset + last)
            expected |= of_image & (queries >= offset + first) & (queries < offset + last)
        made = cache.encoder_mask(CANVAS, model.config.text.sliding_window if kind == SLIDING else None, blocks)
        if isinstance(made, str):
            assert made == "causal" and (expected == (keys <= queries)).all()
        else:
            assert np.array_equal(np.array(made), expected)
        assert cache.canvas_mask(CANVAS, model.config.text.sliding_window if kind == SLIDING else None) is None


def test_a_prompt_and_its_canvas_are_the_same_anywhere():
    """Sliding layers see only what is near, and rotations only how far: a far prompt reads as a near one."""
    case = Case("sliding", "SSS", prompt=1, canvas=CANVAS)
    config = ModelConfig.from_dict(case.config)
    text = replace(config.text, layers=(config.text.layers[0],) * 3, max_position_embeddings=CONTEXT)
    model = DiffusionGemma(replace(config, text=text))
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    model.load_weights([(n, mx.array(case.weight(ours.published_name(n), shape))) for n, shape in shapes.items()])
    prompt, canvas = mx.arange(60)[None] % 50, mx.arange(CANVAS)[None]

    def logits(offset: int, misplaced: int = 0) -> np.ndarray:
        cache = model.make_cache()
        if offset:
            junk = mx.random.normal((1, 2, WINDOW, 16), key=mx.random.key(1))
            for layer in cache.layers:
                layer.append(junk, junk)
            cache.offset = offset
        model.encode(prompt, cache)
        cache.offset += misplaced
        return np.array(model.logits(model.denoise(canvas, cache)))

    near = logits(0)
    scale = np.abs(near).max()
    far = np.abs(logits(CONTEXT - 60 - CANVAS) - near).max() / scale
    off_by_one = np.abs(logits(0, misplaced=1) - near).max() / scale
    assert far < 0.01 < off_by_one
