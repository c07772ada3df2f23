"""The autoregressive decoder: the encoder's logits, mlx-lm's sampling, and what holds of replies however written."""

import threading
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from golden import ours
from golden.cases import CASES
from kernels import graph_of
from mlx_lm.generate import generate_step
from mlx_lm.models import gemma4_text
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors
from random_models import TINY, config_json, in_mlx_lm, random_model, true_pattern
from scripted import ByteProcessor

from mlx_diffusiongemma import (
    Canvas,
    CanvasError,
    ChatSession,
    GenerationOptions,
    Hole,
    PromptError,
    Text,
    edit,
    fill,
    generate,
    generate_batch,
    infill,
    load,
    stream,
)
from mlx_diffusiongemma.events import Commit, Done, Draft, Prefill
from mlx_diffusiongemma.generation.decoders import tokens as choosing
from mlx_diffusiongemma.generation.request import request_options
from mlx_diffusiongemma.model import layers, moe, vocabulary
from mlx_diffusiongemma.model.budgets import SLIDING_GROWTH
from mlx_diffusiongemma.model.cache import CacheRows

WINDOW, CANVAS = TINY["sliding_window"], 32
CONFIG = config_json(true_pattern(6), CANVAS)
LEFT_TO_RIGHT = GenerationOptions(decoder="autoregressive", max_tokens=12)
GREEDY = replace(LEFT_TO_RIGHT, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, None)


@pytest.fixture(scope="module")
def peer(model):
    return in_mlx_lm(model, CONFIG, None)


class Processor(ByteProcessor):
    """Every token is a letter: text that stop strings can be looked for in."""

    def draft_text(self, tokens):
        return "".join(chr(97 + token % 26) for token in tokens)


def prompt_of(length: int) -> list[int]:
    return [(7 * place + place // 5) % 128 for place in range(length)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_the_reference_however_the_tokens_were_appended(case):
    """Its hidden states, stored or computed by Transformers, through the tied head (see test_fidelity)."""
    with np.load(Path(ours.__file__).with_name("text.npz")) as golden:
        encoded = golden[f"{case.name}/encoded"].astype(np.float64)
    model, prompt = ours.build(case), case.tokens("prompt")
    weight = np.array(model.model.decoder.embed_tokens.weight, np.float64)
    cap = model.config.text.final_logit_softcapping
    expected = np.tanh(encoded @ weight.T / cap) * cap
    caches = [model.make_cache() for _ in prompt]
    cache = caches[0] if len(caches) == 1 else CacheRows(caches)
    parts, start = [], 0
    for length in cycle((1, 3, 1, 1, 7, 2)):
        if start >= prompt.shape[1]:
            break
        parts.append(model.logits(model.encode_lazily(mx.array(prompt[:, start : start + length]), cache)))
        start += length
    found = np.array(mx.concatenate(parts, axis=1))
    assert np.abs(found - expected).max() <= 3e-5 * np.abs(expected).max()


@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + CANVAS, 200])
def test_greedy_tokens_are_those_of_mlx_lm(model, peer, length):
    options = replace(GREEDY, max_tokens=2 * SLIDING_GROWTH + 3)
    result = generate(model, Processor(), prompt_of(length), options=options)
    steps = generate_step(mx.array(prompt_of(length)), peer, max_tokens=options.max_tokens)
    assert result.tokens == [token for token, _ in steps]
    assert result.finish_reason == "length"
    assert result.stats.passes == result.stats.forwards == options.max_tokens and result.stats.steps == []


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"top_k": 0},
        {"top_k": 3, "top_p": 1.0},
        {"top_k": 5, "top_p": 0.5, "temperature": 0.3},
        {"top_k": 0, "top_p": 0.9, "min_p": 0.1, "temperature": 2.0},
        {"top_k": 700, "min_p": 0.02},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_mlx_lms_sampler(model, given):
    settings = request_options(model, replace(LEFT_TO_RIGHT, **given))
    logits = 3 * mx.random.normal((4, 2000), key=mx.random.key(1))
    found = choosing.candidates(logits, settings)
    kept = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if settings.top_p < 1:
        kept = apply_top_p(kept, settings.top_p)
    if settings.min_p:
        kept = apply_min_p(kept, settings.min_p)
    if settings.top_k:
        kept = apply_top_k(kept, settings.top_k)
    expected = np.array(mx.softmax(kept / settings.temperature, axis=-1))
    dense = np.zeros_like(expected)
    np.put_along_axis(dense, np.array(found.ids), np.exp(np.array(found.log_probabilities)), axis=-1)
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    assert ((dense > 0) == (expected > 0)).all()


def test_draws_follow_the_distribution(model):
    settings = request_options(model, replace(LEFT_TO_RIGHT, top_k=4, top_p=1.0))
    logits = mx.array([[1.0, 0.0, 2.0, -1.0, 0.5, -30.0]])
    rows = 20_000
    keys = choosing.token_keys([5] * rows, list(range(rows)), 0)
    drawn = np.array(choosing.candidates(mx.broadcast_to(logits, (rows, 6)), settings).draw(keys))
    weights = np.exp([1.0, 0.0, 2.0, -np.inf, 0.5, -np.inf])
    expected = rows * weights / weights.sum()
    counts = np.bincount(drawn, minlength=6)
    assert counts[3] == counts[5] == 0
    possible = expected > 0
    assert (((counts - expected) ** 2)[possible] / expected[possible]).sum() < 16.3  # 3 degrees of freedom, p = 0.001


def test_the_repetition_penalty_is_mlx_lms(model, peer):
    prompt = prompt_of(30)
    options = replace(GREEDY, max_tokens=40, repetition_penalty=1.8)
    steps = generate_step(
        mx.array(prompt), peer, max_tokens=40, logits_processors=make_logits_processors(repetition_penalty=1.8)
    )
    tokens = [token for token, _ in steps]
    assert generate(model, Processor(), prompt, options=options).tokens == tokens
    assert generate(model, Processor(), prompt, options=replace(options, repetition_penalty=1.0)).tokens != tokens


def test_a_commit_comes_with_every_token(model):
    events = list(stream(model, Processor(), prompt_of(20), options=LEFT_TO_RIGHT, seed=1))
    commits = [event for event in events if isinstance(event, Commit)]
    assert [len(commit.tokens) for commit in commits] == [1] * 12 and not any(isinstance(e, Draft) for e in events)
    assert [commit.canvas for commit in commits] == list(range(12)) and isinstance(events[-1], Done)
    assert isinstance(events[0], Prefill)


def test_end_tokens_and_stop_strings_end_a_reply(model):
    whole = generate(model, Processor(), prompt_of(20), options=GREEDY)
    end = whole.tokens[5]
    first = whole.tokens.index(end)
    ended = generate(model, Processor(), prompt_of(20), options=replace(GREEDY, end_tokens=(end,)))
    assert ended.tokens == whole.tokens[:first] and ended.finish_reason == "stop"
    stop = whole.text[4:6]
    stopped = generate(model, Processor(), prompt_of(20), options=replace(GREEDY, stop=(stop,)))
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"


def test_a_reply_ends_with_the_context():
    small = random_model(config_json(true_pattern(6), CANVAS, max_position_embeddings=50), None)
    result = generate(small, Processor(), prompt_of(44), options=GREEDY)
    assert len(result.tokens) == 6 and result.finish_reason == "length"
    for decoder in ("autoregressive", "speculative"):
        options = replace(GREEDY, decoder=decoder)
        assert len(generate(small, Processor(), prompt_of(49), options=options).tokens) == 1
        with pytest.raises(PromptError, match="at most 49 fit"):
            generate(small, Processor(), prompt_of(50), options=options)


@pytest.mark.parametrize("options", [LEFT_TO_RIGHT, replace(LEFT_TO_RIGHT, repetition_penalty=1.3)], ids=str)
def test_in_a_batch_each_reply_is_the_one_that_it_is_alone(model, options):
    prompts = [prompt_of(length) for length in (3, 40, 17, 90, 1, 33)]
    options = replace(options, max_tokens=20, end_tokens=(11, 12, 13, 14, 15))  # of different lengths
    results = list(generate_batch(model, Processor(), prompts, options=options, seed=9, rows=3))
    assert sorted(result.index for result in results) == list(range(6))
    assert len({len(result.tokens) for result in results}) > 1
    for result in results:
        alone = generate(model, Processor(), prompts[result.index], options=options, seed=result.seed)
        assert (alone.tokens, alone.finish_reason) == (result.tokens, result.finish_reason)


def test_another_seed_is_another_text(model):
    texts = {generate(model, Processor(), prompt_of(9), options=LEFT_TO_RIGHT, seed=seed).text for seed in (1, 2, 1)}
    assert len(texts) == 2


def test_a_kept_prefix_changes_nothing_and_is_not_encoded_again(model):
    cache = model.make_cache()
    for length in (60, 60, 75, 40):
        fresh = generate(model, Processor(), prompt_of(length), options=LEFT_TO_RIGHT, seed=4)
        kept = generate(model, Processor(), prompt_of(length), options=LEFT_TO_RIGHT, seed=4, cache=cache)
        assert kept.tokens == fresh.tokens
        assert len(cache.labels) == cache.offset
    again = generate(model, Processor(), prompt_of(40), options=LEFT_TO_RIGHT, seed=4, cache=cache)
    assert again.stats.cached_tokens == 39
    follow_up = [*prompt_of(40), *again.tokens, 3, 4]
    result = generate(model, Processor(), follow_up, options=LEFT_TO_RIGHT, seed=4, cache=cache)
    assert result.stats.cached_tokens >= 40 + len(again.tokens) - 1
    assert result.tokens == generate(model, Processor(), follow_up, options=LEFT_TO_RIGHT, seed=4).tokens


def test_decoders_share_a_cache(model):
    cache = model.make_cache()
    diffusion = GenerationOptions(max_tokens=40, seed=2)
    for options in (LEFT_TO_RIGHT, diffusion, LEFT_TO_RIGHT, diffusion):
        fresh = generate(model, Processor(), prompt_of(70), options=options, seed=2)
        assert generate(model, Processor(), prompt_of(70), options=options, seed=2, cache=cache).tokens == fresh.tokens


def test_cancelling_stops_within_one_token_and_leaves_the_cache_usable(model):
    cache, cancel = model.make_cache(), threading.Event()
    events = stream(
        model, Processor(), prompt_of(30), options=replace(LEFT_TO_RIGHT, max_tokens=500), cache=cache, cancel=cancel
    )
    commits = 0
    for event in events:
        if isinstance(event, Commit):
            commits += 1
            if commits == 5:
                cancel.set()
    assert commits == 5 and isinstance(event, Done) and event.finish_reason == "cancelled"
    assert len(cache.labels) == cache.offset
    fresh = generate(model, Processor(), prompt_of(33), options=GREEDY)
    assert generate(model, Processor(), prompt_of(33), options=GREEDY, cache=cache).tokens == fresh.tokens


class Interrupt(Exception):
    """Stands for Ctrl-C: it comes from anywhere."""


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative"])
@pytest.mark.parametrize("at", [3, 20, 57])
def test_what_is_interrupted_anywhere_leaves_a_cache_that_is_right(model, decoder, at):
    """In the middle of a pass, where some layers have a token more than others."""
    options = replace(GREEDY, decoder=decoder, max_tokens=30)
    cache, calls = model.make_cache(), []
    attend = layers.attend_rows

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise Interrupt
        return attend(*arguments)

    events = stream(model, Processor(), prompt_of(43), options=options, cache=cache)
    with pytest.raises(Interrupt):
        for event in events:
            if isinstance(event, Commit) and layers.attend_rows is attend:
                layers.attend_rows = interrupted
    layers.attend_rows = attend
    assert len(cache.labels) == cache.offset
    fresh = generate(model, Processor(), prompt_of(46), options=options)
    assert generate(model, Processor(), prompt_of(46), options=options, cache=cache).tokens == fresh.tokens


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative"])
def test_another_thread_can_use_the_cache_afterwards(model, decoder):
    """However many tokens were written: also where the last one made room in a window."""
    failed = []

    def read(cache):
        try:
            mx.eval(cache.arrays)
        except RuntimeError as error:
            failed.append(error)

    for count in (1, *range(SLIDING_GROWTH - 4, SLIDING_GROWTH + 5)):
        cache = model.make_cache()
        generate(
            model, Processor(), prompt_of(40), options=replace(GREEDY, decoder=decoder, max_tokens=count), cache=cache
        )
        thread = threading.Thread(target=read, args=(cache,))
        thread.start()
        thread.join()
    assert not failed


def test_closing_the_events_frees_the_cache(model):
    cache = model.make_cache()
    events = stream(model, Processor(), prompt_of(30), options=LEFT_TO_RIGHT, cache=cache)
    for event in events:
        if isinstance(event, Commit):
            break
    events.close()
    assert generate(model, Processor(), prompt_of(30), options=LEFT_TO_RIGHT, cache=cache).tokens


def test_after_anything_done_to_the_cache_it_continues_as_from_scratch(model):
    """Encode, append, trim, rewind, fork and restore, mixed at random: the next logits are those of a new cache."""
    random = np.random.default_rng(0)
    cache, held = model.make_cache(), []
    for _ in range(120):
        match int(random.integers(7)):
            case 0:
                tokens = random.integers(0, 128, int(random.integers(1, 60))).tolist()
                model.encode(mx.array([tokens]), cache)
                held += tokens
            case 1 | 2:
                tokens = random.integers(0, 128, int(random.integers(1, 4))).tolist()
                model.encode_lazily(mx.array([tokens]), cache)
                cache.labels += tokens
                held += tokens
            case 3:
                count = min(int(random.integers(CANVAS)), len(held))
                cache.trim(count)
                del held[len(held) - count :]
            case 4:
                cache.snapshot()
                del held[cache.rewind(int(random.integers(len(held) + 1))) :]
            case 5:
                cache = cache.fork()
            case 6:
                arrays = {name: mx.array(array) for name, array in cache.export().items()}
                restored = model.make_cache()
                restored.adopt(arrays, cache.labels)
                cache = restored
        assert cache.labels == held and cache.offset == len(held)
        fresh = model.make_cache()
        hidden = model.encode(mx.array([[*held, 5]]), fresh)[:, -1]
        found = model.encode_lazily(mx.array([[5]]), cache.fork())[:, -1]
        np.testing.assert_allclose(np.array(found), np.array(hidden), atol=2e-4)


def test_a_session_goes_on_where_it_was_saved(demo_float32, tmp_path):
    loaded, processor = load(demo_float32)
    options = replace(LEFT_TO_RIGHT, seed=3, max_tokens=20)
    chat = ChatSession(loaded, processor, options=options)
    chat.ask("count from 3")
    chat.save(tmp_path / "talk")
    following = chat.ask("sort 312")
    other = ChatSession(loaded, processor, options=options)
    other.restore(tmp_path / "talk")
    again = other.ask("sort 312")
    assert again.text == following.text and again.stats.cached_tokens > 0
    assert following.stats.cached_tokens > 0


def test_the_demo_sees_images_and_declares_tools_left_to_right(demo_float32):
    """It was not trained for it, so all that can be asked is that the same prompt gives the reference's argmax."""
    from PIL import Image

    loaded, processor = load(demo_float32)
    options = replace(GREEDY, max_tokens=3)
    picture = Image.new("RGB", (64, 64), "red")
    result = generate(loaded, processor, "colors?", images=[picture], options=options)
    prompt = processor.prompt("colors?", images=[picture])
    held = list(prompt.tokens)
    for token in result.tokens:
        cache = loaded.make_cache()
        hidden = loaded.encode(mx.array([held]), cache, prompt.images)
        assert loaded.logits(hidden[:, -1:]).argmax(-1).item() == token
        held.append(token)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (replace(LEFT_TO_RIGHT, max_steps=4), "max_steps is an option of the diffusion decoder"),
        (replace(LEFT_TO_RIGHT, entropy_bound=0.3), "entropy_bound is an option of the diffusion decoder"),
        (replace(LEFT_TO_RIGHT, canvas_length=8), "canvas_length is an option of the diffusion decoder"),
        (GenerationOptions(temperature=0.5), "temperature is an option of the causal decoders"),
        (GenerationOptions(top_k=3), "top_k is an option of the causal"),
    ],
    ids=str,
)
def test_options_of_another_decoder_are_refused(model, options, said):
    with pytest.raises(PromptError, match=said):
        stream(model, Processor(), "hi", options=options)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1, float("nan"), "hot")),
        *({"top_p": value} for value in (0, 1.5)),
        *({"top_k": value} for value in (-1, 2.5)),
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"decoder": "ar"},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(PromptError):
        GenerationOptions(**wrong)


def test_a_starting_canvas_is_for_the_diffusion_decoder(model):
    with pytest.raises(CanvasError, match="for the diffusion decoder"):
        stream(model, Processor(), "hi", canvas=Canvas([5]), options=LEFT_TO_RIGHT)


def test_holes_are_filled_on_a_canvas_only(model):
    for fill_in in (
        lambda: infill(model, Processor(), ["a", Hole(4), "b"], options=LEFT_TO_RIGHT),
        lambda: edit(model, Processor(), "abc", span=(0, 2), instruction="shorter", options=LEFT_TO_RIGHT),
        lambda: fill(model, Processor(), "who?", {"name": Text(4)}, options=LEFT_TO_RIGHT),
    ):
        with pytest.raises(PromptError, match="filled in on a canvas"):
            fill_in()


def test_the_checkpoints_own_options_are_no_options_of_another_decoder(model):
    filled = replace(model.options, decoder="autoregressive", max_tokens=3)
    assert generate(model, Processor(), prompt_of(4), options=filled).tokens


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4-bit"])
def test_a_token_launches_no_more_than_in_mlx_lm(bits):
    config = config_json(true_pattern(30), CANVAS)
    model = random_model(config, bits)
    peer = in_mlx_lm(model, config, bits)
    model.fuse()
    mx.eval(model)
    prompt, token = mx.arange(40)[None], mx.zeros((1, 1), mx.int32)
    cache, peer_cache = model.make_cache(), make_prompt_cache(peer)
    model.encode(prompt, cache)
    peer(prompt, cache=peer_cache)
    mx.eval([layer.state for layer in peer_cache])
    compiled = [(layers, "geglu"), (moe, "geglu"), (vocabulary, "_capped")]
    mine = graph_of(lambda token: model.logits(model.encode_lazily(token, cache)), token, compiled=compiled)
    compiled = [(gemma4_text, "geglu"), (gemma4_text, "logit_softcap")]
    theirs = graph_of(lambda token: peer(token, cache=peer_cache), token, compiled=compiled)
    assert mine.count <= theirs.count and mine.copies.total() <= theirs.copies.total()


def test_a_token_copies_no_window(model):
    """Full windows are copied, to drop what left them, once in SLIDING_GROWTH tokens."""
    concatenated = []
    concatenate = mx.concatenate

    def counted(arrays, *rest, **options):
        if max(array.ndim for array in arrays) == 4:
            concatenated.append(max(array.shape[2] for array in arrays))
        return concatenate(arrays, *rest, **options)

    options = replace(GREEDY, max_tokens=3 * SLIDING_GROWTH)
    with patch.object(mx, "concatenate", counted):
        generate(model, Processor(), prompt_of(2 * WINDOW + CANVAS), options=options)
    sliding = sum(layer.is_sliding for layer in model.config.text.layers)
    # Keys and values, once for the prompt's second part, and once each time that the room is used up.
    assert len(concatenated) <= 2 * sliding * (1 + 3)


def test_memory_stays_flat_over_a_long_reply(model):
    options = replace(GREEDY, max_tokens=600)
    held = []
    for event in stream(model, Processor(), prompt_of(50), options=options):
        if isinstance(event, Commit) and event.canvas % 100 == 99:
            held.append(mx.get_active_memory())
    assert max(held) - min(held) <= 2**20
