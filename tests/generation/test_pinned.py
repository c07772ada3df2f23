"""Pinned positions never change, whatever the model wants; free ones behave as if nothing were pinned."""

import random

import mlx.core as mx
import numpy as np
import pytest
from scripted import VOCABULARY, ByteProcessor, ScriptedCache, ScriptedModel, sure, unsure

from mlx_diffusiongemma import Canvas, GenerationOptions, generate, load
from mlx_diffusiongemma.generation.denoising import Denoising, Job
from mlx_diffusiongemma.generation.sampling import Draws

LENGTH = 12


def random_start(draw, length):
    """Tokens (some of them noise) and pins on some of those that are given."""
    tokens = [draw.randrange(VOCABULARY) if draw.random() < 0.6 else None for _ in range(length)]
    return Canvas(tokens, [token is not None and draw.random() < 0.7 for token in tokens])


def denoise(model, options, starts, seed):
    """The steps of several canvases after one prefix."""
    run, cache = Denoising(model, options, VOCABULARY), ScriptedCache()
    for row, start in enumerate(starts):
        run.add(Job(start, cache, Draws(seed, row)))
    return run.steps()


@pytest.mark.parametrize("seed", range(12))
def test_pinned_tokens_never_move(seed):
    """Random masks, batches and logits: in what the model reads, in what is shown, and in the conditioning."""
    draw = random.Random(seed)
    rows, steps = draw.choice([1, 2, 5]), 5
    logits = [3 * mx.random.normal((rows, LENGTH, VOCABULARY), key=mx.random.key(100 * seed + n)) for n in range(steps)]
    model = ScriptedModel(logits, LENGTH)
    options = GenerationOptions(max_steps=steps, entropy_bound=draw.choice([0.1, 5.0])).filled_from(model.options)
    starts = [random_start(draw, LENGTH) for _ in range(rows)]
    shown = list(denoise(model, options, starts, seed))
    assert [len(step) for step in shown] == [rows] * steps
    for row, start in enumerate(starts):
        pinned = np.array(start.pinned)
        tokens = np.array([token or 0 for token in start.tokens])[pinned]
        for step in shown:
            assert (np.array(step[row].tokens)[pinned] == tokens).all()
            assert not np.array(step[row].accepted)[pinned].any()
        for canvas in model.canvases:
            assert (np.array(canvas)[row][pinned] == tokens).all()
        for soft in model.conditions[1:]:
            assert (np.array(soft)[row, pinned, 0] == tokens).all()  # this model's embedding of an id is the id


@pytest.mark.parametrize("seed", range(4))
def test_pins_reach_over_several_canvases(seed):
    draw = random.Random(seed)
    canvas = random_start(draw, 3 * LENGTH - 2)
    model = ScriptedModel([unsure(LENGTH)[None]], LENGTH)
    options = GenerationOptions(max_steps=2, max_tokens=3 * LENGTH, end_tokens=(VOCABULARY,), seed=seed)
    result = generate(model, ByteProcessor(), "q", canvas=canvas, options=options)
    assert len(result.tokens) == 3 * LENGTH
    for place, (token, pinned) in enumerate(zip(canvas.tokens, canvas.pinned, strict=True)):
        assert not pinned or result.tokens[place] == token


def test_a_pinned_position_takes_nothing_of_the_entropy_budget():
    """Two free positions that fit the bound only while the uncertain pinned one does not count."""
    logits = mx.concatenate([unsure(1), sure("ab", 2, sharpness=8.0)])[None]
    model = ScriptedModel([logits], 3)
    canvas = Canvas([5], pinned=[True])
    [first] = next(denoise(model, model.options, [canvas.part(0, 3)], seed=0))
    assert first.accepted == [False, True, True]


def test_an_empty_mask_changes_nothing(demo_float32):
    model, processor = load(demo_float32)
    for seed, prompt in enumerate(("reverse canvas", "solve 42.3/3.24/1.../2.31")):
        plain = generate(model, processor, prompt, seed=seed, max_tokens=128)
        for canvas in (Canvas([]), Canvas([None] * 100, [False] * 100)):
            again = generate(model, processor, prompt, seed=seed, max_tokens=128, canvas=canvas)
            assert again.tokens == plain.tokens and again.stats.steps == plain.stats.steps


def test_a_wrong_pinned_token_is_kept_and_the_rest_adapts(demo_float32):
    """One half of the reply is pinned right, and one character wrong."""
    model, processor = load(demo_float32)
    wrong = processor.tokenizer.encode("z", add_special_tokens=False)[0]
    canvas = Canvas([None, None, wrong], [False, False, True])
    assert generate(model, processor, "reverse canvas", seed=0, canvas=canvas).text == "saznac"
    right = processor.tokenizer.encode("sa", add_special_tokens=False)
    canvas = Canvas(right, [True] * len(right))
    assert generate(model, processor, "reverse canvas", seed=0, canvas=canvas).text == "savnac"
