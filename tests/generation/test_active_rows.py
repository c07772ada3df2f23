"""Active rows: what is computed is what the plain loop computes, and a text depends on its own canvas alone."""

from __future__ import annotations

from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from random_models import config_json, random_model, true_pattern
from typer.testing import CliRunner

from mlx_diffusiongemma import MODES, Canvas, GenerationOptions, PromptError, generate, generate_batch, load, stream
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.events import Draft
from mlx_diffusiongemma.generation.decoders import active_rows
from mlx_diffusiongemma.generation.decoders.active_rows import ActiveRows
from mlx_diffusiongemma.generation.denoising import Job
from mlx_diffusiongemma.generation.request import request_options
from mlx_diffusiongemma.generation.sampling import Draws
from mlx_diffusiongemma.model.cache import CacheRows

CANVAS, HIDDEN, VOCABULARY = 32, 64, 128
PROMPTS = ["solve 1.3./..12/2.4./.3.1", "count from 17", "sort 53142", "solve 42.3/3.24/1.../2.31", "reverse canvas"]
TURBO = GenerationOptions(max_tokens=128, active_rows=True)


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


@pytest.fixture
def eager(monkeypatch):
    """Rows rest soon and for long, so that a demo's few steps show it."""
    for name, value in (("WHOLE_FIRST", 1), ("HELD", 1), ("NEARLY", 0), ("WHOLE_EVERY", 100), ("NEAR", 0)):
        monkeypatch.setattr(active_rows, name, value)


@pytest.fixture
def counts(monkeypatch):
    """The rows that each dispatched step computes of a canvas; None stands for all."""
    seen: list[int | None] = []
    dispatched = ActiveRows._dispatched

    def noted(self, pending):
        if pending is not None:
            seen.append(self._size)
        return dispatched(self, pending)

    monkeypatch.setattr(ActiveRows, "_dispatched", noted)
    return seen


def twice_denoised(model, prefixes):
    """A state after which rows can rest: canvases after their prefixes, and what the second step starts from."""
    caches = [model.make_cache() for _ in prefixes]
    for length, cache in zip(prefixes, caches, strict=True):
        model.encode(mx.arange(length)[None] % VOCABULARY, cache)
    together = caches[0] if len(caches) == 1 else CacheRows(caches)
    canvas = mx.random.randint(0, VOCABULARY, (len(prefixes), CANVAS), key=mx.random.key(0))
    soft = mx.random.normal((len(prefixes), CANVAS, HIDDEN), key=mx.random.key(1))
    mx.eval(model.denoise(canvas, together, soft))
    together.settle()
    return together, canvas, soft


@pytest.mark.parametrize("prefixes", [[1], [90], [31, 33]])
def test_rows_computed_apart_are_those_of_the_whole_canvas(prefixes):
    """Every other row's keys and values are as fresh here; around the edges of the window."""
    model = random_model(config_json(true_pattern(6), CANVAS), None)
    cache, canvas, soft = twice_denoised(model, prefixes)
    whole = model.denoise(canvas, cache, soft)
    cache.settle()
    for count in (2, 7, CANVAS):
        rows = [np.random.default_rng(row).permutation(CANVAS)[:count] for row in range(len(prefixes))]
        index = mx.array(np.stack(rows))
        index[:, -1] = index[:, 0]  # a repetition, as a batch has them
        places = index, CANVAS
        own = mx.take_along_axis(soft, index[..., None], axis=1)
        part = model.denoise(mx.take_along_axis(canvas, index, axis=1), cache, own, places)
        cache.settle()
        np.testing.assert_allclose(part, mx.take_along_axis(whole, index[..., None], axis=1), atol=1e-5)


def test_all_rows_in_their_order_are_the_same_bits():
    model = random_model(config_json(true_pattern(6), CANVAS), None)
    cache, canvas, soft = twice_denoised(model, [40])
    whole = model.denoise(canvas, cache, soft)
    cache.settle()
    places = mx.arange(CANVAS)[None], CANVAS
    part = model.denoise(canvas, cache, soft, places)
    assert mx.array_equal(whole, part)
    key = mx.random.key(3)[None]
    for expected, found in zip(
        model.read_vocabulary(whole, 0.6, key), model.read_vocabulary(part, 0.6, key, places), strict=True
    ):
        assert mx.array_equal(expected, found)


def test_draws_are_those_of_the_whole_canvas():
    model = random_model(config_json(true_pattern(1), CANVAS), None)
    hidden = mx.random.normal((2, CANVAS, HIDDEN), key=mx.random.key(4))
    index = mx.array([[5, 3, 30], [0, 31, 7]])
    keys = mx.stack([mx.random.key(1), mx.random.key(2)])
    whole = model.read_vocabulary(hidden, 5.0, keys)
    part = model.read_vocabulary(mx.take_along_axis(hidden, index[..., None], axis=1), 5.0, keys, (index, CANVAS))
    assert mx.array_equal(part.sample, mx.take_along_axis(whole.sample, index, axis=1))
    assert not mx.array_equal(whole.sample, whole.tokens)


def test_where_no_row_settles_every_step_is_the_plain_one(demo, monkeypatch, counts):
    monkeypatch.setattr(active_rows, "SURE", -1.0)
    model, processor = demo
    for seed, prompt in enumerate(PROMPTS):
        plain = [e for e in stream(model, processor, prompt, seed=seed, max_tokens=128) if isinstance(e, Draft)]
        found = [e for e in stream(model, processor, prompt, seed=seed, options=TURBO) if isinstance(e, Draft)]
        assert found == plain
    assert set(counts) == {None}


def test_company_changes_nothing(demo, eager, counts):
    model, processor = demo
    results = list(generate_batch(model, processor, PROMPTS * 3, options=TURBO, seed=2, rows=4))
    assert len(results) == 15
    assert any(count is not None for count in counts)
    for result in results:
        alone = generate(model, processor, PROMPTS[result.index % len(PROMPTS)], options=TURBO, seed=result.seed)
        assert alone.tokens == result.tokens and alone.stats.steps == result.stats.steps


def test_settled_rows_rest_and_a_step_of_all_rows_ends_the_canvas(demo, eager, counts):
    model, processor = demo
    ended: list[int | None] = []
    for seed in range(4):
        generate(model, processor, PROMPTS[0], options=TURBO, seed=seed)
        ended.append(counts[-1])
    assert any(count is not None for count in counts)
    assert set(ended) == {None}
    sizes = {max(64 * part // 16, 1) for part in active_rows.SIXTEENTHS}
    assert {count for count in counts if count is not None} <= sizes


def test_a_canvas_begins_with_all_rows_after_another_was_dropped(demo, eager, counts):
    model, processor = demo
    never_sure = GenerationOptions(max_steps=5, confidence=0.0, seed=1, active_rows=True)
    cache = model.make_cache()
    model.encode(mx.array([processor.prompt(PROMPTS[4]).tokens]), cache)
    start = Canvas([]).part(0, model.config.canvas_length)

    def shown(run: ActiveRows) -> list[list[int]]:
        run.add(Job(start, cache, Draws(seed=1)))
        return [steps[0].tokens for steps in run.steps()]

    run = ActiveRows(model, request_options(model, never_sure), model.config.text.vocab_size)
    expected = shown(run)
    assert len(expected) == 5 and counts[-1] is not None
    dropped = Job(start, cache, Draws(seed=2))
    run.add(dropped)
    for _ in range(3):
        run.step()
    assert counts[-1] is not None
    run.drop([dropped])
    assert shown(run) == expected


def test_part_of_a_canvas_needs_a_whole_one_before_it():
    model = random_model(config_json(true_pattern(1), CANVAS), None)
    with pytest.raises(ValueError, match="behind a prefix of one row"):
        model.denoise(mx.zeros((1, 2), mx.int32), model.make_cache(), None, (mx.arange(2)[None], CANVAS))


def test_the_mode_is_named_and_its_option_checked(demo_float32):
    assert MODES["turbo"].active_rows and not GenerationOptions().active_rows
    with pytest.raises(PromptError, match="active_rows must be True or False"):
        GenerationOptions(active_rows=2)
    asked = ["generate", "reverse canvas", "--mode", "turbo", "--model", str(demo_float32), "--seed", "0"]
    with patch.object(ActiveRows, "step", side_effect=ActiveRows.step, autospec=True) as step:
        found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0 and "savnac" in found.stdout and step.called
