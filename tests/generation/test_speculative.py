"""The speculative decoder: whatever its drafts are like, the text is the autoregressive decoder's, or as probable."""

import threading
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from random_models import TINY, config_json, random_model, true_pattern
from test_autoregressive import Processor, prompt_of

from mlx_diffusiongemma import GenerationOptions, PromptError, generate, generate_batch, stream
from mlx_diffusiongemma.events import Commit, Done, Draft
from mlx_diffusiongemma.generation.decoders import drafting, speculative
from mlx_diffusiongemma.generation.decoders.plans import AdaptivePlan, FixedPlan
from mlx_diffusiongemma.generation.decoders.speculative import Row, Speculative
from mlx_diffusiongemma.generation.decoders.tokens import candidates, penalized
from mlx_diffusiongemma.generation.request import Request, request_options
from mlx_diffusiongemma.generation.writer import Writer

CANVAS, TOGETHER = 32, 250
CONFIG = config_json(true_pattern(6), CANVAS)
SPECULATIVE = GenerationOptions(decoder="speculative", max_tokens=24, seed=3)
GREEDY = replace(SPECULATIVE, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, None)


def drafts_of(length: int, steps: int):
    """Within this, all drafts are of one shape."""
    return patch.object(drafting, "AdaptivePlan", lambda longest, most: FixedPlan(length, steps))


def left_to_right(model, prompt, options):
    return generate(model, Processor(), prompt, options=replace(options, decoder="autoregressive"))


@pytest.mark.parametrize("shape", [(2, 1), (8, 1), (8, 3), (CANVAS, 2)], ids=str)
@pytest.mark.parametrize("length", [1, TINY["sliding_window"] - 1, TINY["sliding_window"] + 1, 100])
def test_at_temperature_0_the_text_is_the_greedy_one(model, shape, length):
    expected = left_to_right(model, prompt_of(length), GREEDY)
    with drafts_of(*shape):
        result = generate(model, Processor(), prompt_of(length), options=GREEDY)
    assert result.tokens == expected.tokens and result.finish_reason == expected.finish_reason
    assert generate(model, Processor(), prompt_of(length), options=GREEDY).tokens == expected.tokens


def test_with_a_repetition_penalty_too(model):
    options = replace(GREEDY, repetition_penalty=1.5)
    for length in (2, 50):
        expected = left_to_right(model, prompt_of(length), options)
        with drafts_of(6, 2):
            assert generate(model, Processor(), prompt_of(length), options=options).tokens == expected.tokens


@pytest.fixture(scope="module")
def broad():
    """A model whose distributions are broad, with few tokens, so that their counts can be compared."""
    return random_model(config_json(true_pattern(2), CANVAS, vocab_size=12, hidden_size=32), None)


def pairs_drawn(model, prompt, options, samples) -> Counter:
    """How often each first and second token come after each other behind `prompt`, whose last token is known."""
    settings, prefix = request_options(model, options), model.make_cache()
    model.encode(mx.array([prompt[:-1]]), prefix)
    drawn: Counter = Counter()
    for start in range(0, samples, TOGETHER):
        decoder = Speculative(model, settings, FixedPlan(4, 1))
        rows = []
        for seed in range(start, start + TOGETHER):
            request = Request(Processor().prompt(prompt), replace(settings, seed=seed))
            rows.append(Row(Writer(model, Processor(), request, seed), decoder.plan, mx.array(prompt[-1:])))
            rows[-1].writer.cache = prefix.fork()
        decoder.start(rows)
        while rows:
            for _ in decoder.step():
                pass
            ended = [row for row in rows if len(row.writer.tokens) > 2]
            drawn.update(tuple(row.writer.tokens[1:3]) for row in ended)
            decoder.drop([row.writer for row in ended])
            rows = [row for row in rows if row not in ended]
    return drawn


def pairs_expected(model, prompt, options) -> np.ndarray:
    settings = request_options(model, replace(options, decoder="autoregressive"))
    size = model.config.text.vocab_size

    def following(tokens: list[list[int]]) -> np.ndarray:
        logits = model.logits(model.encode(mx.array(tokens), model.make_cache())[:, -1:])[:, 0]
        found = candidates(penalized(logits, settings, mx.array(tokens)), settings)
        dense = np.zeros((len(tokens), size))
        np.put_along_axis(dense, np.array(found.ids), np.exp(np.array(found.log_probabilities)), axis=-1)
        return dense

    first = following([prompt])[0]
    second = following([[*prompt, a] for a in range(size)])
    return first[:, None] * second


def chi_square(drawn: Counter, expected: np.ndarray) -> float:
    """How many standard deviations the statistic lies above its mean."""
    samples = sum(drawn.values())
    counts = np.array([[drawn[b, c] for c in range(expected.shape[1])] for b in range(expected.shape[0])])
    assert (counts[expected == 0] == 0).all()
    enough = expected * samples >= 5
    freedom = enough.sum() - 1
    statistic = ((counts - expected * samples)[enough] ** 2 / (expected * samples)[enough]).sum()
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(
    ("sampler", "samples"),
    [
        ({"top_p": 1.0, "top_k": 0}, 3000),
        ({"top_p": 0.9, "top_k": 7, "temperature": 1.3}, 1500),
        ({"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.4}, 500),
    ],
    ids=str,
)
def test_the_text_is_distributed_as_the_autoregressive_decoders(broad, sampler, samples):
    prompt, options = [3, 1, 4, 1, 5], replace(SPECULATIVE, **sampler)
    expected = pairs_expected(broad, prompt, options)
    assert chi_square(pairs_drawn(broad, prompt, options, samples), expected) < 4


@pytest.mark.parametrize("wrong", ["every token passes", "what is refused is drawn again from p"])
def test_a_broken_rule_would_be_noticed(broad, wrong):
    prompt, options = [3, 1, 4, 1, 5], replace(SPECULATIVE, top_p=1.0, top_k=0)
    expected = pairs_expected(broad, prompt, options)
    if wrong == "every token passes":
        broken = patch.object(speculative, "_leading", lambda passed: mx.full(passed.shape[:1], passed.shape[1]))
    else:
        broken = patch.object(mx, "maximum", lambda a, b: mx.ones_like(a) if b == 0 else a)
    with broken:
        drawn = pairs_drawn(broad, prompt, options, 1500)
    assert chi_square(drawn, expected) > 10


def test_every_canvas_is_drafted_then_committed(model):
    with drafts_of(8, 2):
        events = list(stream(model, Processor(), prompt_of(20), options=SPECULATIVE))
    commits = [event for event in events if isinstance(event, Commit)]
    assert [commit.canvas for commit in commits] == list(range(len(commits)))
    for commit in commits[1:]:
        drafts = [event for event in events if isinstance(event, Draft) and event.canvas == commit.canvas]
        if not drafts:
            continue  # the last token alone needs none
        assert [draft.step for draft in drafts] == [1, 2, 3] and all(draft.max_steps == 3 for draft in drafts)
        assert drafts[-1].tokens[: len(commit.tokens)] == commit.tokens
        assert len({len(getattr(d, name)) for d in drafts for name in ("tokens", "accepted", "entropy", "pieces")}) <= 2
    done = events[-1]
    assert isinstance(done, Done) and done.stats.passes == len(commits) - 1
    assert done.stats.forwards == done.stats.passes + sum(done.stats.steps)
    assert done.stats.generated_tokens == sum(len(commit.tokens) for commit in commits) == SPECULATIVE.max_tokens


def test_in_a_batch_each_reply_is_the_one_that_it_is_alone(model):
    prompts = [prompt_of(length) for length in (3, 40, 17, 90, 1, 33)]
    options = replace(SPECULATIVE, max_tokens=25, end_tokens=(11, 12, 13, 14, 15))
    for result in generate_batch(model, Processor(), prompts, options=options, rows=4):
        alone = generate(model, Processor(), prompts[result.index], options=options, seed=result.seed)
        assert (alone.tokens, alone.finish_reason, alone.stats.steps) == (
            result.tokens,
            result.finish_reason,
            result.stats.steps,
        )


def test_a_kept_prefix_changes_nothing(model):
    cache = model.make_cache()
    for length in (60, 60, 75, 40):
        fresh = generate(model, Processor(), prompt_of(length), options=SPECULATIVE)
        kept = generate(model, Processor(), prompt_of(length), options=SPECULATIVE, cache=cache)
        assert kept.tokens == fresh.tokens and len(cache.labels) == cache.offset


def test_cancelling_stops_within_one_pass_and_leaves_the_cache_usable(model):
    for at in range(2, 9):
        cache, cancel = model.make_cache(), threading.Event()
        with drafts_of(8, 3):
            events = stream(model, Processor(), prompt_of(30), options=SPECULATIVE, cache=cache, cancel=cancel)
            seen = []
            for event in events:
                seen.append(event)
                if len(seen) == at:
                    cancel.set()
        assert isinstance(seen[-1], Done) and seen[-1].finish_reason == "cancelled" and len(seen) <= at + 3
        assert len(cache.labels) == cache.offset
        fresh = generate(model, Processor(), prompt_of(33), options=GREEDY)
        assert generate(model, Processor(), prompt_of(33), options=GREEDY, cache=cache).tokens == fresh.tokens


def test_a_reply_ends_with_the_context():
    small = random_model(config_json(true_pattern(2), CANVAS, max_position_embeddings=50), None)
    result = generate(small, Processor(), prompt_of(40), options=replace(SPECULATIVE, canvas_length=8))
    assert len(result.tokens) == 10 and result.finish_reason == "length"


def test_end_tokens_and_stop_strings_end_a_reply(model):
    whole = left_to_right(model, prompt_of(20), GREEDY)
    end, stop = whole.tokens[5], whole.text[4:6]
    with drafts_of(8, 1):
        ended = generate(model, Processor(), prompt_of(20), options=replace(GREEDY, end_tokens=(end,)))
        stopped = generate(model, Processor(), prompt_of(20), options=replace(GREEDY, stop=(stop,)))
    assert ended.tokens == whole.tokens[: whole.tokens.index(end)] and ended.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"


def test_options_of_the_diffusion_decoder_alone_are_refused(model):
    with pytest.raises(PromptError, match="entropy_bound is an option of the diffusion decoder"):
        stream(model, Processor(), "hi", options=replace(SPECULATIVE, entropy_bound=0.2))
    assert generate(model, Processor(), "hi", options=replace(SPECULATIVE, max_steps=2, canvas_length=4)).tokens


def test_the_plan_drafts_longer_where_drafts_are_kept_and_gives_up_where_they_are_not():
    plan = AdaptivePlan(256, 16).start()
    for _ in range(30):
        length, _ = plan.shape()
        plan.learn(length - 1, length - 1)
    assert plan.shape()[0] == 256
    plan = AdaptivePlan(256, 16).start()
    drafted = 0
    for _ in range(60):
        length, steps = plan.shape()
        drafted += steps > 0
        plan.learn(length - 1, 0)
    assert 1 <= drafted <= 12 and plan.shape() == (1, 0)
