"""The cache: whatever way a prefix got into it, and whatever canvases were denoised after it, it is the same prefix."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from convert_data import true_config
from golden import ours
from golden.cases import WINDOW, Case

from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.model import diffusion_gemma, layers
from mlx_diffusiongemma.model.cache import SNAPSHOT_BYTES, Cache
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma

CANVAS = 16
VOCABULARY = 60
TOLERANCE = 1e-5  # of the largest value
ONE_CHUNK = 10**6


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return ours.build(Case("cache", "SSFSSF", prompt=1, canvas=CANVAS))


def tokens(count: int, seed: int = 0, rows: int = 1) -> mx.array:
    return mx.random.randint(0, VOCABULARY, (rows, count), key=mx.random.key(seed))


def filled(model: DiffusionGemma, prompt: mx.array) -> Cache:
    cache = model.make_cache()
    model.encode(prompt, cache)
    return cache


def canvas_states(model: DiffusionGemma, cache: Cache, seed: int = 99) -> mx.array:
    return model.denoise(tokens(CANVAS, seed), cache)


def prefix(cache: Cache) -> list[np.ndarray]:
    """A copy of the keys and values that the next token can see, layer by layer."""
    visible = [(layer, slice(layer.length - layer.visible, layer.length)) for layer in cache.layers]
    return [np.array(array[:, :, part]) for layer, part in visible for array in layer.buffers]


def assert_same(first: list[np.ndarray] | mx.array, second: list[np.ndarray] | mx.array) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * np.abs(np.array(other)).max())


def memory_in_use() -> int:
    """Bytes, once the device has let go of what it worked on."""
    mx.synchronize()
    return mx.get_active_memory()


# Chunks that end before, at and after one, two and three windows.
@pytest.mark.parametrize("chunk", [1, *(n * WINDOW + edge for n in (1, 2, 3) for edge in (-1, 0, 1)), 64])
@pytest.mark.parametrize("count", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 9 * WINDOW + 5])
def test_chunked_prefill_equals_a_whole_one(model, count, chunk, monkeypatch):
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", ONE_CHUNK)
    whole = model.make_cache()
    expected = model.encode(tokens(count), whole)
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", chunk)
    chunked = model.make_cache()
    assert_same(model.encode(tokens(count), chunked), expected)
    assert chunked.offset == whole.offset == count
    assert_same(prefix(chunked), prefix(whole))
    assert_same(canvas_states(model, chunked), canvas_states(model, whole))


def test_chunked_prefill_of_a_long_prompt(monkeypatch):
    """At the true window and chunk sizes around it, over four of them."""
    shape = {"sliding_window": 1024, "num_attention_heads": 1, "num_key_value_heads": 1, "global_head_dim": 16}
    model = ours.build(Case("long", "SF", prompt=1, canvas=CANVAS, text=shape))
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", ONE_CHUNK)
    whole = filled(model, tokens(4100))
    for chunk in (1000, 1023, 1024, 1025):
        monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", chunk)
        chunked = filled(model, tokens(4100))
        assert_same(prefix(chunked), prefix(whole))
        assert_same(canvas_states(model, chunked), canvas_states(model, whole))


def test_a_prompt_in_uneven_pieces_equals_a_whole_one(model):
    prompt = tokens(75)
    cache = model.make_cache()
    start = 0
    for count in (1, 6, 8, 2, 17, 1, 40):
        model.encode(prompt[:, start : start + count], cache)
        start += count
    whole = filled(model, prompt)
    assert_same(prefix(cache), prefix(whole))
    assert_same(canvas_states(model, cache), canvas_states(model, whole))


@pytest.mark.parametrize("queries", [1, 5, 7])
def test_attention_in_parts_changes_nothing(model, queries, monkeypatch):
    """However few queries fit the score budget, over causal, windowed and canvas attention."""
    prompt = tokens(41)
    whole = filled(model, prompt)
    expected = canvas_states(model, whole)
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", 15)
    monkeypatch.setattr(layers, "SCORE_BUDGET", 4 * 4 * 57 * queries)
    parted = filled(model, prompt)
    assert_same(prefix(parted), prefix(whole))
    assert_same(canvas_states(model, parted), expected)


@pytest.mark.parametrize("chunk", [5, WINDOW, ONE_CHUNK])
def test_a_ragged_batch_equals_its_rows(model, chunk, monkeypatch):
    """A prompt, a canvas after it, a commit and the next canvas, for rows of 1 to many windows."""
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", chunk)
    lengths = [1, WINDOW - 1, WINDOW, WINDOW + 1, 23, 50]
    rows = len(lengths)
    prompts, first = tokens(max(lengths), 1, rows), tokens(CANVAS, 2, rows)
    commit, last = tokens(CANVAS, 3, rows), tokens(CANVAS, 4, rows)
    batch = model.make_cache()
    encoded = model.encode(prompts, batch, lengths=lengths)
    seen = [model.denoise(first, batch), model.encode(commit, batch), model.denoise(last, batch)]
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        cache = model.make_cache()
        assert_same(encoded[one, :length], model.encode(prompts[one, :length], cache))
        alone = [model.denoise(first[one], cache), model.encode(commit[one], cache), model.denoise(last[one], cache)]
        assert_same([np.array(states[one]) for states in seen], [np.array(states) for states in alone])


def test_one_row_serves_many_canvases(model):
    """Several at once, then another number of them, step after step, through commits and rewinds: each as if alone."""
    cache, alone = filled(model, tokens(29)), filled(model, tokens(29))

    def assert_serves(rows: int) -> None:
        canvases = tokens(CANVAS, rows, rows)
        together = model.denoise(canvases, cache)
        cache.settle()
        for row in range(rows):
            assert_same(together[row : row + 1], model.denoise(canvases[row : row + 1], alone))

    for rows in (3, 3, 2, 1, 4):
        assert_serves(rows)
    for each in (cache, alone):
        model.encode(tokens(CANVAS, 5), each)
    assert_serves(4)
    for each in (cache, alone):
        each.trim(CANVAS)
    assert_serves(4)


@pytest.mark.parametrize("rows", [1, 3])
def test_denoising_leaves_the_prefix_alone(model, rows):
    cache = filled(model, tokens(29))
    before = prefix(cache)
    for step in range(4):
        mx.eval(model.denoise(tokens(CANVAS, step, rows), cache))
        cache.settle()
    assert all(np.array_equal(*pair) for pair in zip(prefix(cache), before, strict=True))


@pytest.mark.parametrize("settle", [False, True])
def test_a_dropped_graph_leaves_the_cache_usable(model, settle):
    """The loop builds a step ahead, and drops it where the canvas turns out to be done."""
    cache = filled(model, tokens(29))
    expected = np.array(canvas_states(model, cache))
    model.denoise(tokens(CANVAS, 1), cache)
    if settle:
        cache.settle()
    assert_same(canvas_states(model, cache), expected)
    model.encode(tokens(CANVAS, 5), cache)
    fresh = filled(model, tokens(29))
    model.encode(tokens(CANVAS, 5), fresh)
    assert_same(canvas_states(model, cache), canvas_states(model, fresh))


def test_settled_canvases_are_written_in_place():
    """No step copies the prefix, not even one layer's."""
    shape = {"head_dim": 64, "global_head_dim": 64, "num_key_value_heads": 4, "num_global_key_value_heads": 4}
    model = ours.build(Case("in place", "SFSF", prompt=1, canvas=CANVAS, text={**shape, "sliding_window": 4000}))
    cache = model.make_cache()
    for layer in cache.layers:
        layer.append(*(mx.random.normal((1, 4, 6000, 64), key=mx.random.key(seed)) for seed in (0, 1)))
    cache.offset = 6000
    cache.evaluate()
    before = memory_in_use()
    mx.reset_peak_memory()
    for seed in range(4):
        states = canvas_states(model, cache, seed)
        cache.settle()
        mx.eval(states, cache.arrays)
    assert mx.get_peak_memory() <= before + 0.1 * cache.nbytes
    assert memory_in_use() <= before + 0.01 * cache.nbytes


def test_chunks_are_written_in_place(monkeypatch):
    """No chunk copies the full layers' prefix, the last one's neither."""
    shape = {"global_head_dim": 64, "num_global_key_value_heads": 4}
    model = ours.build(Case("chunks", "SF", prompt=1, canvas=CANVAS, text=shape))
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", 8)
    cache = model.make_cache()
    full = cache.layers[-1]
    keys, values = (mx.zeros((1, 4, 50_000, 64)) for _ in range(2))  # beside them, a chunk's work is small
    full.buffers = keys, values
    del keys, values
    cache.evaluate()
    peaks, before = [], memory_in_use()
    for _ in model.encode_chunks(tokens(40), cache):
        peaks.append(mx.get_peak_memory() - before)
        mx.reset_peak_memory()
    assert max(peaks[1:]) < 0.5 * full.buffers[0].nbytes


@pytest.mark.parametrize("rows", [1, 8])
def test_releasing_frees_what_a_canvas_held(model, rows):
    cache = filled(model, tokens(29))
    canvas = tokens(CANVAS, 1, rows)
    mx.eval(canvas)
    before = memory_in_use()
    for settle in (cache.settle, lambda: None):
        mx.eval(model.denoise(canvas, cache))
        settle()
        mx.eval(cache.arrays)
        cache.release()
        # A little more: the allocator hands out buffers somewhat larger than asked for.
        assert memory_in_use() <= before + 0.1 * cache.nbytes


def test_forks_go_their_own_ways(model):
    """Neither half of a fork sees what the other encodes, trims or denoises."""
    cache = filled(model, tokens(29))
    before, expected = prefix(cache), np.array(canvas_states(model, cache))
    shorter, longer = cache.fork(), cache.fork()
    shorter.trim(9)
    model.encode(tokens(9, 7), shorter)
    model.encode(tokens(CANVAS, 8), longer)
    mx.eval(canvas_states(model, longer))
    longer.settle()
    assert all(np.array_equal(*pair) for pair in zip(prefix(cache), before, strict=True))
    assert_same(canvas_states(model, cache), expected)
    assert_same(
        canvas_states(model, shorter),
        canvas_states(model, filled(model, mx.concatenate([tokens(29)[:, :20], tokens(9, 7)], 1))),
    )
    assert_same(
        canvas_states(model, longer),
        canvas_states(model, filled(model, mx.concatenate([tokens(29), tokens(CANVAS, 8)], 1))),
    )


@pytest.mark.parametrize("trimmed", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, CANVAS])
@pytest.mark.parametrize("count", [CANVAS, CANVAS + WINDOW, 61])
def test_trimming_is_exact(model, count, trimmed):
    """Up to a canvas, also after sliding layers have dropped tokens, and what is encoded next follows from it."""
    prompt = tokens(count)
    cache = filled(model, prompt)
    cache.trim(trimmed)
    fresh = model.make_cache()
    if trimmed < count:
        model.encode(prompt[:, : count - trimmed], fresh)
        assert_same(prefix(cache), prefix(fresh))
    assert_same(canvas_states(model, cache), canvas_states(model, fresh))
    for each in (cache, fresh):
        model.encode(tokens(WINDOW + 1, 5), each)
    assert_same(canvas_states(model, cache), canvas_states(model, fresh))


def test_by_default_one_snapshot_of_the_published_model_is_kept():
    config = ModelConfig.from_dict(true_config())
    cache = Cache(config.text, config.canvas_length)
    for layer, shape in zip(cache.layers, config.text.layers, strict=True):
        if layer.window is not None:  # lazy: nothing of this size is made
            layer.append(*(mx.zeros((1, shape.num_key_value_heads, 2000, shape.head_dim), mx.bfloat16),) * 2)
    assert cache._now().nbytes <= SNAPSHOT_BYTES < 2 * cache._now().nbytes


def test_trimming_what_no_layer_keeps_is_refused(model):
    """The refusal changes nothing."""
    cache = filled(model, tokens(61))
    expected = np.array(canvas_states(model, cache))
    for too_many in (CANVAS + 1, 40, 62, -1):
        with pytest.raises(ValueError, match="cannot trim"):
            cache.trim(too_many)
    assert_same(canvas_states(model, cache), expected)
    cache.trim(CANVAS - 1)
    cache.trim(1)
    with pytest.raises(ValueError, match="cannot trim"):
        cache.trim(1)
    assert cache.offset == 61 - CANVAS


def test_a_short_prefix_can_be_trimmed_to_nothing(model):
    """Nothing has left the window and the room for a rewind, so any number of tokens can go."""
    count = WINDOW - 1 + CANVAS
    cache = filled(model, tokens(count))
    cache.trim(count)
    assert cache.offset == 0
    assert_same(canvas_states(model, cache), canvas_states(model, model.make_cache()))
