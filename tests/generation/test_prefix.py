"""A cache kept from one prompt to the next: what they share is not encoded again, and nothing else changes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from golden import ours
from golden.cases import Case
from PIL import Image
from scripted import ByteProcessor

from mlx_diffusiongemma import BusyError, GenerationOptions, PromptError, generate, load, stream
from mlx_diffusiongemma.events import Done, Draft, Event, Prefill
from mlx_diffusiongemma.generation.prefix import encode_prompt
from mlx_diffusiongemma.generation.replying import collect
from mlx_diffusiongemma.model import diffusion_gemma
from mlx_diffusiongemma.model.cache import Cache
from mlx_diffusiongemma.model.layer_cache import LayerCache
from mlx_diffusiongemma.processing.images import prepare_image
from mlx_diffusiongemma.processing.processor import Prompt

CANVAS, WINDOW = 16, 8
KEPT = WINDOW - 1 + CANVAS
IMAGE = 61
OPTIONS = GenerationOptions(
    max_steps=2, entropy_bound=0.1, t_max=0.8, t_min=0.4, stability=1, confidence=0.0, end_tokens=(), max_tokens=256
)


@pytest.fixture(scope="module")
def model():
    return ours.build(Case("prefix", "SSFSF", prompt=1, canvas=CANVAS))


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def prompt(*pieces: tuple[int, int]) -> Prompt:
    """Pieces of so many tokens, each drawn from a seed of its own."""
    drawn = [np.random.default_rng(seed).integers(0, 60, count).tolist() for count, seed in pieces]
    return Prompt("", [token for piece in drawn for token in piece])


def read(model, cache, given: Prompt) -> int:
    """Encode a prompt; returns how many of its tokens were there already."""
    reused, *_ = encode_prompt(model, cache, given)
    return reused


def states(model, cache) -> np.ndarray:
    canvas = mx.random.randint(0, 60, (1, CANVAS), key=mx.random.key(5))
    return np.array(model.denoise(canvas, cache))


def assert_equals_fresh(model, cache, given: Prompt) -> None:
    fresh = model.make_cache()
    model.encode(mx.array([given.tokens]), fresh, given.images)
    assert cache.labels == fresh.labels and cache.offset == fresh.offset == len(given.tokens)
    expected = states(model, fresh)
    np.testing.assert_allclose(states(model, cache), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("more", [0, 1, WINDOW, 40])
@pytest.mark.parametrize("reply", [0, 1, 2, 5])
@pytest.mark.parametrize("first", [3, 50])
def test_a_longer_prompt_costs_what_is_new(model, first, reply, more):
    """However many canvases of another reply were encoded after the first prompt."""
    cache = model.make_cache()
    read(model, cache, prompt((first, 1)))
    for seed in range(reply):
        model.encode(mx.array([prompt((CANVAS, 100 + seed)).tokens]), cache)
    longer = prompt((first, 1), (more, 2))
    assert read(model, cache, longer) == first
    assert_equals_fresh(model, cache, longer)


def test_committed_canvases_are_reused_where_the_next_prompt_repeats_them(model):
    cache = model.make_cache()
    read(model, cache, prompt((30, 1)))
    for seed in (2, 3):
        model.encode(mx.array([prompt((CANVAS, seed)).tokens]), cache)
    longer = prompt((30, 1), (CANVAS, 2), (CANVAS - 3, 3), (9, 4))
    assert read(model, cache, longer) == 30 + 2 * CANVAS - 3
    assert_equals_fresh(model, cache, longer)


@pytest.mark.parametrize("parted", [0, 1, 7, 29, 60, 75, 99])
def test_any_other_prompt_is_as_if_the_cache_were_new(model, parted):
    """Wherever it parts from the last, and again when the same prompts come back."""
    cache = model.make_cache()
    prompts = [prompt((100, 1)), prompt((parted, 1), (45, 2)), prompt((parted, 1), (3, 3))]
    for given in prompts + prompts:
        assert read(model, cache, given) <= len(given.tokens)
        assert_equals_fresh(model, cache, given)


def test_what_prompts_share_is_found_again_however_far_they_go_on(model):
    """The second prompt shows where they part; from the third on, that place is kept."""
    cache = model.make_cache()
    assert [read(model, cache, prompt((40, 1), (60, seed))) for seed in (2, 3, 4, 5)] == [0, 0, 40, 40]


def test_small_rewinds_need_no_snapshot(model):
    cache = model.make_cache(snapshot_bytes=0)
    read(model, cache, prompt((100, 1)))
    assert cache.snapshots == []
    shorter = prompt((100 - CANVAS, 1), (2, 2))
    assert read(model, cache, shorter) == 100 - CANVAS
    assert_equals_fresh(model, cache, shorter)


def test_snapshots_stay_within_their_bytes(model):
    cache = model.make_cache()
    read(model, cache, prompt((100, 1)))
    one = cache.snapshots[0].nbytes
    cache = model.make_cache(snapshot_bytes=2 * one)
    for pieces in range(1, 6):
        read(model, cache, prompt(*[(40, seed) for seed in range(pieces)]))
        assert sum(snapshot.nbytes for snapshot in cache.snapshots) <= 2 * one
    assert [snapshot.offset for snapshot in cache.snapshots] == [160, 200]


def test_what_is_stopped_halfway_leaves_a_cache_that_works(model, monkeypatch):
    """Between chunks, and in the middle of the layers."""
    cache, whole = model.make_cache(), prompt((30, 1), (40, 2))
    read(model, cache, prompt((30, 1)))
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", 8)
    steps = encode_prompt(model, cache, whole)
    assert [next(steps) for _ in range(3)] == [30, 38, 46]
    steps.close()
    assert cache.offset == 46
    append = LayerCache.append
    calls = iter(range(100))
    monkeypatch.setattr(LayerCache, "append", lambda *given: interrupt() if next(calls) == 7 else append(*given))
    with pytest.raises(KeyboardInterrupt):
        read(model, cache, whole)
    assert cache.offset == 0 and not cache.labels and not cache.snapshots and not cache.arrays
    assert read(model, cache, whole) == 0
    assert_equals_fresh(model, cache, whole)


def test_what_one_thread_leaves_unfinished_does_not_stop_another(demo, monkeypatch):
    model, processor = demo
    cache, given = model.make_cache(), processor.prompt("sort 53142")
    generate(model, processor, given, cache=cache, seed=0)
    longer = processor.prompt("sort 53142 and more")
    failures = []

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            generate(model, processor, longer, cache=cache, seed=0)
        failures.append(True)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "evaluate", interrupt)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert failures
    for prompt in (given, longer):
        kept = generate(model, processor, prompt, cache=cache, seed=0)
        assert kept.tokens == generate(model, processor, prompt, seed=0).tokens


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_cache_of_something_else_is_refused(demo):
    model, processor = demo
    batch = model.make_cache()
    model.encode(mx.array([[2, 5], [2, 6]]), batch)
    other = ours.build(Case("other", "SF", prompt=1, canvas=CANVAS)).make_cache()
    padded = model.make_cache()
    model.encode(mx.array([[2, 5, 6, 0]]), padded, lengths=[3])
    assert not padded.labels
    for cache in (batch, other, padded):
        with pytest.raises(PromptError, match="make_cache"):
            stream(model, processor, "sort 31", cache=cache)


@pytest.mark.parametrize("way", ["close", "drop", "end", "done", "cancel", "fail"])
def test_a_cache_in_use_is_refused_until_the_request_is_over(demo, way, monkeypatch):
    model, processor = demo
    cache, cancel = model.make_cache(), threading.Event()
    early = stream(model, processor, "sort 21", cache=cache, max_tokens=8)  # not begun, it uses nothing
    events = stream(model, processor, "sort 312", cache=cache, seed=0, max_tokens=8, cancel=cancel)
    next(events)
    for refused in (lambda: next(early), lambda: stream(model, processor, "sort 21", cache=cache)):
        with pytest.raises(BusyError, match="in use by another request"):
            refused()
    assert generate(model, processor, "sort 21", cache=cache.fork(), max_tokens=8).tokens
    match way:
        case "close":
            events.close()
        case "drop":
            del events
        case "end":
            list(events)
        case "done":
            next(event for event in events if isinstance(event, Done))
        case "cancel":
            cancel.set()
            assert list(events)[-1].finish_reason == "cancelled"
        case "fail":
            monkeypatch.setattr(model, "read_vocabulary", interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(events)
            monkeypatch.undo()
    kept = generate(model, processor, "sort 312", cache=cache, seed=0)
    assert kept.tokens == generate(model, processor, "sort 312", seed=0).tokens


def test_of_two_threads_one_gets_the_cache(demo):
    model, processor = demo
    cache, together, found = model.make_cache(), threading.Barrier(2, timeout=60), []
    requests = [stream(model, processor, "sort 312", cache=cache, seed=0, max_tokens=8) for _ in range(2)]

    def begin(events):
        together.wait()
        try:
            found.append(next(events))
        except BusyError as error:
            found.append(error)
        together.wait()  # neither is over before both have tried

    threads = [threading.Thread(target=begin, args=(events,)) for events in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(each).__name__ for each in found) == ["BusyError", "Prefill"]


def image_prompt(processor, *colours: str, question: str = "colors?") -> Prompt:
    pictures = [Image.new("RGB", (96, 96), colour) for colour in colours]
    return processor.prompt(question, images=pictures)


def test_images_are_part_of_the_prefix_by_their_content(demo):
    model, processor = demo
    cache = model.make_cache()
    red_blue, red_green = image_prompt(processor, "red", "blue"), image_prompt(processor, "red", "green")
    size = red_blue.images[0].soft_tokens
    second = red_blue.tokens.index(model.config.image_token_id) + size + 2
    assert red_blue.tokens == red_green.tokens
    for given, cached in ((red_blue, 0), (red_green, 0), (red_blue, second), (red_blue, len(red_blue.tokens))):
        assert read(model, cache, given) == cached
        fresh = model.make_cache()
        model.encode(mx.array([given.tokens]), fresh, given.images)
        one, other = (np.array(model.denoise(mx.array([list(range(30, 94))]), each)) for each in (cache, fresh))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    without = Prompt("", red_blue.tokens)
    assert read(model, cache, without) == red_blue.tokens.index(model.config.image_token_id)


def test_an_image_is_reused_as_a_whole(model):
    """Two that begin alike to all appearances: the digest is one, and the length is not."""
    picture = prepare_image(Image.new("RGB", (48, 48)), budget=70)
    cache = model.make_cache()
    cache.labels = [1, 2, *[picture.digest] * 3]
    cache.offset = 5
    for layer in cache.layers:
        shape = (1, 1, 5, 32) if layer.window is None else (1, 2, 5, 16)
        layer.append(mx.zeros(shape), mx.zeros(shape))
    steps = encode_prompt(model, cache, Prompt("", [1, 2, *[IMAGE] * 4, 3], (picture,)))
    assert next(steps) == 2


HISTORY = [{"role": "user", "content": "sort 53142"}, {"role": "assistant", "content": "12345"}]


def test_replies_are_those_of_a_fresh_run(demo):
    """Over a conversation that grows, goes back and thinks, with replies of several canvases."""
    model, processor = demo
    cache = model.make_cache()
    conversations = [
        (HISTORY[:1], False),
        ([*HISTORY, {"role": "user", "content": "reverse canvas"}], False),
        ([*HISTORY, {"role": "user", "content": "count from 17"}], True),
        ([*HISTORY, {"role": "user", "content": "count from 17"}], True),
        ([*HISTORY, {"role": "user", "content": "solve 42.3/3.24/1.../2.31"}], False),
    ]
    encoded = []
    for messages, thinking in conversations:
        given = processor.prompt(messages, thinking=thinking)
        kept = generate(model, processor, given, cache=cache, seed=3, max_tokens=150)
        fresh = generate(model, processor, given, seed=3, max_tokens=150)
        assert kept.tokens == fresh.tokens and kept.stats.steps == fresh.stats.steps
        assert fresh.stats.cached_tokens == 0
        encoded.append(len(given.tokens) - kept.stats.cached_tokens)
    assert encoded[3] == 0 and encoded[1] < 40


def test_nothing_is_encoded_where_the_whole_prompt_is_there(demo, monkeypatch):
    model, processor = demo
    cache = model.make_cache()
    given = processor.prompt("sort 53142")
    expected = generate(model, processor, given, cache=cache, seed=0)
    monkeypatch.setattr(model, "encode_chunks", interrupt)
    events = list(stream(model, processor, given, cache=cache, seed=0))
    assert [event for event in events if isinstance(event, Prefill)] == [Prefill(len(given.tokens), len(given.tokens))]
    stats = events[-1].stats
    assert stats.cached_tokens == stats.prompt_tokens and stats.prompt_tokens_per_second == 0
    assert [event.tokens for event in events if isinstance(event, Draft)][-1][: len(expected.tokens)] == expected.tokens


def test_a_second_turn_after_two_thousand_tokens_is_ten_times_faster(demo):
    """To its first draft, in processor time, and encodes only what it adds."""
    model, processor = demo
    text = " ".join(f"{number * 7919 % 10007}" for number in range(420))
    history = [{"role": "user", "content": text}, {"role": "assistant", "content": "12345"}]
    first = processor.prompt(history[:1])
    second = processor.prompt([*history, {"role": "user", "content": "sort 53142"}])
    assert len(first.tokens) >= 2000
    cache = model.make_cache()
    generate(model, processor, first, cache=cache, seed=0, max_tokens=64)

    def timed(kept) -> tuple[float, list[Event]]:
        started = time.process_time()
        events = stream(model, processor, second, cache=kept, seed=0)
        begun = []
        for event in events:
            begun.append(event)
            if isinstance(event, Draft):
                break
        seconds = time.process_time() - started
        return seconds, [*begun, *events]

    runs = [timed(cache.fork()) for _ in range(3)]
    fresh, expected = timed(None)
    kept, events = min(runs, key=lambda run: run[0])
    assert collect(events).tokens == collect(expected).tokens
    stats = events[-1].stats
    assert stats.cached_tokens >= len(first.tokens)
    assert stats.prompt_tokens - stats.cached_tokens <= len(second.tokens) - len(first.tokens)
    assert fresh >= 10 * kept, f"{fresh * 1000:.1f} ms against {kept * 1000:.1f} ms"


def test_the_context_ends_a_reply_that_follows_a_cached_prompt():
    model = ours.build(Case("context", "SF", prompt=1, canvas=CANVAS, text={"max_position_embeddings": 96}))
    model.options = replace(OPTIONS, canvas_length=CANVAS)
    cache, given = model.make_cache(), prompt((96 - 2 * CANVAS, 1))
    for cached in (0, 96 - 2 * CANVAS):
        result = generate(model, ByteProcessor(), given.tokens, cache=cache, seed=0)
        assert result.finish_reason == "length" and len(result.tokens) == 2 * CANVAS
        assert result.stats.cached_tokens == cached
    with pytest.raises(PromptError, match=r"81 tokens.*at most 80 fit"):
        generate(model, ByteProcessor(), prompt((81, 1)).tokens, cache=cache)


@pytest.mark.parametrize("kept", [False, True])
def test_a_long_prompt_is_cancelled_between_chunks(demo_float32, monkeypatch, kept):
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", 32)
    model, processor = load(demo_float32)
    cancel = threading.Event()
    cache = model.make_cache() if kept else None
    seen = []
    for event in stream(model, processor, [5] * 100, cache=cache, cancel=cancel, seed=0):
        seen.append(event)
        if isinstance(event, Prefill) and event.done:
            cancel.set()
    assert [event.done for event in seen if isinstance(event, Prefill)][-1] == 32
    assert isinstance(seen[-1], Done) and seen[-1].finish_reason == "cancelled"
    assert not any(isinstance(event, Draft) for event in seen)
