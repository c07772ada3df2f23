"""Probabilities of given replies, without writing any."""

import math

import mlx.core as mx
import pytest

from mlx_diffusiongemma import PromptError, choose, generate, load
from mlx_diffusiongemma.filling.scoring import Probe, empty_thought, log_probabilities, mean_probability, noise_canvases


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

    def __init__(self, token):
        self.token = token

    def denoise(self, canvas, cache, self_conditioning=None):
        return mx.zeros((*canvas.shape, 1))

    def logits(self, hidden):
        return mx.broadcast_to(20.0 * (mx.arange(384) == self.token), (*hidden.shape[:2], 384))


def test_an_empty_thought_comes_first_where_the_model_opens_with_one(demo):
    model, processor = demo
    prompt, canvases = processor.prompt("sort 312"), noise_canvases(0, 2, 64, 384)
    cache = model.make_cache()
    model.encode(mx.array([prompt.tokens]), cache)
    assert empty_thought(model, processor, prompt, cache, canvases) == []  # this one replies at once
    marker = processor.tokenizer.get_vocab()["<|channel>"]
    block = empty_thought(Opener(marker), processor, prompt, cache, canvases)
    assert processor.tokenizer.decode(block) == "<|channel>thought\n<channel|>"
    opened = processor.prompt([*prompt.tokens, *block])
    assert empty_thought(Opener(marker), processor, opened, cache, canvases) == []


def test_the_mean_is_of_probabilities():
    assert math.isclose(mean_probability([math.log(0.2), math.log(0.6)]), 0.4, rel_tol=1e-6)


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
