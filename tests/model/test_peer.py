"""The same checkpoint gives the same logits here and in mlx-vlm, whichever of the two converted it."""

import importlib.util

import mlx.core as mx
import numpy as np
import pytest
from conftest import DEMO

from mlx_diffusiongemma import load
from mlx_diffusiongemma.convert import convert_checkpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")


def as_float32(module):
    """Every floating-point array of a module in float32: what is compared is the mathematics, not roundings."""
    module.set_dtype(mx.float32)
    mx.eval(module.parameters())


def converted_here(out):
    return convert_checkpoint(DEMO, out, bits=4).out


def converted_by_mlx_vlm(out):
    from mlx_vlm.convert import convert

    convert(str(DEMO), str(out), quantize=True, q_bits=4)
    return out


@pytest.mark.parametrize("convert", [converted_here, converted_by_mlx_vlm])
def test_logits_are_equal(convert, tmp_path):
    from mlx_vlm.utils import load_model

    directory = convert(tmp_path / "checkpoint")
    ours, _ = load(directory, fuse=False)
    theirs = load_model(directory)
    as_float32(ours)
    as_float32(theirs)
    numbers = np.random.default_rng(0)
    # Longer than the window of 64; no image token among the ids.
    prompt, canvas = (mx.array(numbers.integers(20, 384, (1, count))) for count in (150, 64))
    cache = ours.make_cache()
    ours.encode(prompt, cache)
    hidden = ours.denoise(canvas, cache)
    first = ours.logits(hidden)
    second = ours.logits(ours.denoise(canvas, cache, ours.soft_embedding(first / 0.8)))
    their_cache = theirs.make_cache()
    expected = theirs(input_ids=prompt, cache=their_cache, canvas_ids=canvas).logits
    assert mx.abs(first - expected).max() <= 2e-5 * mx.abs(expected).max()
    again = theirs(cache=their_cache, canvas_ids=canvas, self_conditioning_logits=expected / 0.8).logits
    assert mx.abs(second - again).max() <= 2e-5 * mx.abs(again).max()
