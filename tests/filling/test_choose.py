"""Probabilities of given replies, without writing any."""

import math
import threading

import mlx.core as mx
import pytest

from mlx_diffusiongemma import Done, Hole, Prefill, PromptError, choose, generate, infill, load
from mlx_diffusiongemma.filling.scoring import Probe, log_mean, log_probabilities, noise_canvases, reply_opening


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("sort 312", ["123", "132", "12"]),
        ("reverse abc", ["abc", "cba", "cb"]),
        ("json name=bob age=12", ['{"name": "bob", "age": 12}', "bob"]),
    ],
)
def test_it_agrees_with_full_generation(demo, prompt, options):
    """A fast part of tests/benchmarks/canvas_tasks.py."""
    found = choose(*demo, prompt, options, canvases=1, seed=0)
    assert list(found) == options and math.isclose(sum(found.values()), 1.0)
    assert max(found, key=found.get) == generate(*demo, prompt, seed=0).text
    assert max(found.values()) > 0.9


def test_the_seed_repeats_it_and_canvases_are_averaged(demo):
    options = ["21", "12"]
    once = choose(*demo, "sort 21", options, canvases=2, seed=3)
    assert once == choose(*demo, "sort 21", options, canvases=2, seed=3)
    assert once != choose(*demo, "sort 21", options, canvases=1, seed=3)


def test_probes_are_the_plain_softmax_of_the_logits(demo):
    """Against the definition, over several batches of canvases and positions."""
    model, processor = demo
    prompt = processor.prompt("sort 312")
    cache = model.make_cache()
    model.encode(mx.array([prompt.tokens]), cache)
    canvases = noise_canvases(5, 9, 64, 384)
    probes = [
        Probe(tuple(canvas), place, (canvas[place] + 1) % 384) for canvas in canvases for place in range(0, 60, 12)
    ]
    logits = model.logits(model.denoise(mx.array(canvases), cache))
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for index, value in enumerate(log_probabilities(model, cache, probes)):
        row, probe = divmod(index, 5)[0], probes[index]
        assert math.isclose(value, expected[row, probe.position, probe.token].item(), abs_tol=1e-4)


def test_noise_depends_on_the_seed_and_the_row_only():
    start = noise_canvases(7, 2, 64, 384)
    assert start == noise_canvases(7, 2, 64, 384) and start[0] != start[1]
    assert start[0] == noise_canvases(7, 1, 64, 384)[0]


class Opener:
    """A model that is sure of one token at the first position of any canvas."""

    def __init__(self, token, config):
        self.token, self.config = token, config
        self.asked = 0

    def denoise(self, canvas, cache, self_conditioning=None):
        self.asked += 1
        return mx.zeros((*canvas.shape, 1))

    def logits(self, hidden):
        return mx.broadcast_to(20.0 * (mx.arange(384) == self.token), (*hidden.shape[:2], 384))


def test_an_empty_thought_comes_first_where_the_model_opens_with_one(demo):
    model, processor = demo

    def asked(model, prompt, cache):
        return reply_opening(model, processor, prompt, cache, 64)

    prompt, cache = processor.prompt("sort 312"), demo[0].make_cache()
    model.encode(mx.array([prompt.tokens]), cache)
    assert asked(model, prompt, cache) == []  # this one replies at once
    opener = Opener(processor.tokenizer.get_vocab()["<|channel>"], model.config)
    assert asked(opener, prompt, cache) == [] and not opener.asked  # which the cache remembers
    cache.clear()
    model.encode(mx.array([[5]]), cache)
    block = asked(opener, prompt, cache)
    assert processor.tokenizer.decode(block) == "<|channel>thought\n<channel|>"
    assert asked(opener, prompt, cache) == block and opener.asked == 1
    opened = processor.prompt([*prompt.tokens, *block])
    assert asked(opener, opened, cache) == []


def test_what_is_asked_for_one_prompt_says_nothing_of_another(demo):
    """With thinking on, the reply begins with a thought; the next prompt, without, still replies at once."""
    parts = ["1", Hole(4), "5"]
    alone = infill(*demo, parts, "sort 53142", seed=0).text
    cache = demo[0].make_cache()
    choose(*demo, demo[1].prompt([{"role": "user", "content": "sort 53142"}], thinking=True), ["a", "b"], cache=cache)
    assert infill(*demo, parts, "sort 53142", seed=0, cache=cache).text == alone == "12345"


def test_a_kept_cache_is_used_and_a_busy_one_refused(demo):
    cache, events = demo[0].make_cache(), []
    choices = ["123", "132"]
    first = choose(*demo, "sort 312", choices, seed=0, cache=cache, on_event=events.append)
    again = choose(*demo, "sort 312", choices, seed=0, cache=cache, on_event=events.append)
    assert again == pytest.approx(first) and first == pytest.approx(choose(*demo, "sort 312", choices, seed=0))
    done = [event.stats for event in events if isinstance(event, Done)]
    assert (done[0].cached_tokens, done[1].cached_tokens) == (0, done[1].prompt_tokens)
    assert isinstance(events[0], Prefill)


def test_cancelled_it_decides_nothing(demo):
    cancel = threading.Event()
    cancel.set()
    events = []
    assert choose(*demo, "sort 312", ["123", "132"], cancel=cancel, on_event=events.append) == {}
    assert events[-1].finish_reason == "cancelled"


def test_the_mean_is_of_probabilities():
    assert math.isclose(log_mean([math.log(0.2), math.log(0.6)]), math.log(0.4), rel_tol=1e-6)
    assert math.isclose(log_mean([-2000.0, -2000.0]), -2000.0)


@pytest.mark.parametrize(
    ("options", "canvases", "message"),
    [
        ([], 4, "nothing to choose from"),
        (["yes"], 4, "at least two"),
        (["yes", "no", "yes"], 4, "'yes' is given twice"),
        (["yes", ""], 4, "none of them empty"),
        ("yes", 4, "list of texts"),
        (["yes", 5], 4, "list of texts"),
        (5, 4, "list of texts"),
        ({"yes", "no"}, 4, "list of texts"),
        (["yes", "no"], 0, "canvases is 0"),
        (["yes", "n" * 64], 4, "more than 31 tokens"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(demo, options, canvases, message):
    with pytest.raises(PromptError, match=message):
        choose(*demo, "sort 312", options, canvases=canvases)


@pytest.mark.parametrize("seed", [-1, 2**70, 1.5])
def test_bad_seeds_are_refused_in_one_sentence(demo, seed):
    with pytest.raises(PromptError, match="seed must be a whole number"):
        choose(*demo, "sort 312", ["yes", "no"], seed=seed)


def test_a_prompt_longer_than_the_context_is_refused(demo):
    with pytest.raises(PromptError, match="at most 4032"):
        choose(*demo, "x" * 5000, ["yes", "no"])
