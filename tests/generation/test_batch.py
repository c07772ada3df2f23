"""Many prompts at once, on the trained demo: each reply is the one that its prompt gets alone, and no row is wasted."""

from __future__ import annotations

import threading
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from random_models import config_json, random_model, true_pattern
from scripted import ByteProcessor

from mlx_diffusiongemma import GenerationOptions, PromptError, generate, generate_batch, load
from mlx_diffusiongemma.checkpoints import accounting
from mlx_diffusiongemma.generation import batch
from mlx_diffusiongemma.model.cache import Cache, CacheRows
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma

CANVAS = 16
PROMPTS = [
    *("sort 53142", "reverse canvas", "count from 17", "json name=bob age=12"),
    *("solve 1.3./..12/2.4./.3.1", "sort 91", "reverse ab", "count from 3"),
] * 4


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def settings(number: int) -> GenerationOptions:
    return GenerationOptions(canvas_length=CANVAS, max_tokens=8 * CANVAS, max_steps=24, seed=number)


def test_no_row_is_wasted_and_company_changes_nothing(demo):
    """32 prompts whose replies take one canvas to many, eight at a time."""
    computed: list[int] = []
    dispatched = Cache.settle

    def settle(self):
        computed.append(1)
        dispatched(self)

    with patch.object(Cache, "settle", settle):
        results = list(generate_batch(*demo, PROMPTS, options=settings(5)))
    assert sorted(result.index for result in results) == list(range(32))
    needed = sum(sum(result.stats.steps) for result in results)
    canvases = {len(result.stats.steps) for result in results}
    assert min(canvases) == 1 and max(canvases) >= 5, canvases
    assert needed <= len(computed) <= 1.05 * needed, (len(computed), needed)
    for result in results:
        alone = generate(*demo, PROMPTS[result.index], options=settings(result.seed))
        assert alone.tokens == result.tokens and alone.stats.steps == result.stats.steps
        assert (alone.text, alone.finish_reason, alone.seed) == (result.text, result.finish_reason, result.seed)


def test_memory_stays_flat_over_a_thousand_prompts():
    """Eight rows in flight; what is held after 1,000 prompts is what was held after the first 100."""
    model = random_model(config_json(true_pattern(2), CANVAS), None)
    options = GenerationOptions(max_tokens=CANVAS, canvas_length=CANVAS, max_steps=2, seed=0)
    held = []
    prompts = [[2 + number % 7] * (1 + number % 23) for number in range(1000)]
    for count, _ in enumerate(generate_batch(model, ByteProcessor(), prompts, options=options), start=1):
        if count % 100 == 0:
            mx.clear_cache()
            held.append(mx.get_active_memory())
    assert max(held[1:]) - held[0] <= 0.02 * held[0], held


def test_rows_in_flight_keep_to_the_account(demo, monkeypatch):
    """A machine with room for three replies denoises three at once, however many are allowed."""
    model, _ = demo
    context = 8 * CANVAS + 60
    caches = [accounting.cache_bytes(model.config, context, 4)] * 3
    monkeypatch.setattr(mx, "get_active_memory", lambda: 10**9)
    monkeypatch.setattr(batch, "usable_bytes", lambda: 10**9 + accounting.batch_bytes(model.config, caches, context, 4))
    most = []
    denoise = DiffusionGemma.denoise

    def watched(self, canvas, cache, self_conditioning=None):
        most.append(canvas.shape[0])
        return denoise(self, canvas, cache, self_conditioning)

    with patch.object(DiffusionGemma, "denoise", watched):
        assert len(list(generate_batch(*demo, PROMPTS[:6], options=settings(1)))) == 6
    assert max(most) == 3


def test_each_length_is_accounted_for_once(monkeypatch):
    model = random_model(config_json(true_pattern(2), CANVAS), None)
    contexts = []
    counted = accounting.cache_bytes
    monkeypatch.setattr(batch, "cache_bytes", lambda config, *rest: contexts.append(rest[0]) or counted(config, *rest))
    prompts = [[5] * length for length in (3, 9, 5, 3, 9, 7, 5)]
    options = GenerationOptions(max_tokens=CANVAS, canvas_length=CANVAS, max_steps=1, seed=3)
    assert len(list(generate_batch(model, ByteProcessor(), prompts, options=options, rows=5))) == 7
    assert sorted(contexts) == sorted({length + CANVAS for length in (3, 9, 5, 7)})


def test_a_row_ends_at_its_own_context():
    """Beside a long prompt, a short one has the room that it has alone."""
    model = random_model(config_json(true_pattern(2), CANVAS, max_position_embeddings=200), None)
    options = GenerationOptions(max_tokens=500, canvas_length=CANVAS, max_steps=1, seed=3)
    prompts = [[5] * 150, [5] * 3]
    results = {result.index: result for result in generate_batch(model, ByteProcessor(), prompts, options=options)}
    lengths = [len(results[index].tokens) for index in (0, 1)]
    assert lengths[0] <= 200 - 150 and lengths[1] > 3 * CANVAS
    assert all(result.finish_reason == "length" for result in results.values())


def test_cancelling_a_batch_ends_every_reply(demo):
    cancel = threading.Event()
    results = []
    for result in generate_batch(*demo, PROMPTS, options=settings(2), cancel=cancel):
        results.append(result)
        cancel.set()
    reasons = [result.finish_reason for result in results]
    assert len(reasons) == 32 and set(reasons[8:]) == {"cancelled"}  # eight may have ended with the first one's step


@pytest.mark.parametrize("rows", [0, -1, 1.5, True])
def test_wrong_numbers_of_rows_are_refused(demo, rows):
    with pytest.raises(PromptError, match="rows is"):
        generate_batch(*demo, ["a"], rows=rows)


def test_rows_after_their_own_prefixes_are_computed_as_alone():
    """Prefixes of all lengths around the window, each row at its own place; the second canvases too."""
    model = random_model(config_json(true_pattern(6), CANVAS), None)
    prefixes = [mx.arange(length)[None] % 128 for length in (1, 31, 32, 33, 90)]
    caches = [model.make_cache() for _ in prefixes]
    for prefix, cache in zip(prefixes, caches, strict=True):
        model.encode(prefix, cache)
    canvases = mx.random.randint(0, 128, (5, CANVAS), key=mx.random.key(0))
    soft = mx.random.normal((5, CANVAS, 64), key=mx.random.key(1))
    together = CacheRows(caches)
    first = model.denoise(canvases, together)
    together.settle()
    second = model.denoise(canvases, together, soft)
    for row, cache in enumerate(caches):
        alone = cache.fork()
        np.testing.assert_allclose(first[row], model.denoise(canvases[row : row + 1], alone)[0], atol=1e-5)
        alone.release()
        expected = model.denoise(canvases[row : row + 1], alone, soft[row : row + 1])[0]
        np.testing.assert_allclose(second[row], expected, atol=1e-5)


def test_some_rows_of_a_cache():
    """A ragged batch gives its rows away; they go on as if they had been encoded alone."""
    model = random_model(config_json(true_pattern(6), CANVAS), None)
    lengths = [3, 40, 33]
    tokens = mx.random.randint(0, 128, (3, 40), key=mx.random.key(0))
    batch_cache = model.make_cache()
    model.encode(tokens, batch_cache, lengths=lengths)
    canvas = mx.random.randint(0, 128, (2, CANVAS), key=mx.random.key(1))
    part = batch_cache.rows([2, 0])
    model.encode(canvas, part)
    found = model.denoise(canvas, part)
    for place, row in enumerate((2, 0)):
        alone = model.make_cache()
        model.encode(tokens[row : row + 1, : lengths[row]], alone)
        model.encode(canvas[place : place + 1], alone)
        np.testing.assert_allclose(found[place], model.denoise(canvas[place : place + 1], alone)[0], atol=1e-5)
    assert batch_cache.offset == 40
    with pytest.raises(IndexError, match="rows 0 to 2"):
        batch_cache.rows([3])


def test_every_row_has_its_own_temperature(demo):
    model, _ = demo
    hidden = mx.random.normal((2, 3, 128), key=mx.random.key(1))
    keys = mx.stack([mx.random.key(2), mx.random.key(3)])
    together = model.read_vocabulary(hidden, mx.array([0.8, 0.4]), keys)
    for row, temperature in enumerate((0.8, 0.4)):
        alone = model.read_vocabulary(hidden[row : row + 1], temperature, keys[row : row + 1])
        for mine, own in zip(together, alone, strict=True):
            np.testing.assert_allclose(mine[row], own[0], atol=1e-5)


def test_prompts_with_images_are_answered_in_a_batch(demo):
    _, processor = demo
    pictures = [Image.new("RGB", (96, 96), colour) for colour in ("red", "blue", "green", "red")]
    prompts = [[{"role": "user", "content": processor.content("colors?", [picture])}] for picture in pictures]
    results = {result.index: result for result in generate_batch(*demo, prompts, options=settings(4), rows=3)}
    for index, result in results.items():
        alone = generate(*demo, prompts[index], options=settings(result.seed))
        assert (alone.text, alone.tokens) == (result.text, result.tokens)
    assert len(results) == 4
