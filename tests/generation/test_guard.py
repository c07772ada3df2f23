"""Replies that say nothing: denoised again where the first canvas is empty, and explained where they stay so."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import pytest
from scripted import END, ByteProcessor, ScriptedModel, sure

from mlx_diffusiongemma import Canvas, GenerationOptions, PromptError, generate, generate_batch, stream
from mlx_diffusiongemma.events import Commit, Draft

LENGTH = 8
EMPTY = sure("", LENGTH)
STEPS = 2  # of an attempt
ATTEMPT = 3  # two steps, and the one that is prepared meanwhile


def scripted(*steps: mx.array | list[mx.array]) -> ScriptedModel:
    """One argument per step: logits of one row [L, V], or a list of rows."""
    return ScriptedModel([mx.stack(step) if isinstance(step, list) else step[None] for step in steps], LENGTH)


def test_an_empty_first_canvas_is_denoised_again():
    """The third attempt speaks."""
    model = scripted(*[EMPTY] * 2 * STEPS, sure("hello", LENGTH))
    events = list(stream(model, ByteProcessor(), "q", seed=0))
    stats = events[-1].stats
    assert [event.text for event in events if isinstance(event, Commit)] == ["hello"]
    assert (stats.retries, stats.steps, events[-1].note) == (2, [6], "")
    assert [event.step for event in events if isinstance(event, Draft)] == [1, 2] * 3


def test_every_attempt_draws_anew_and_the_same_with_the_same_seed():
    def starts(seed: int) -> list[tuple[int, ...]]:
        model = scripted(EMPTY)
        generate(model, ByteProcessor(), "q", seed=seed)
        return [tuple(canvas[0].tolist()) for canvas in model.canvases[::ATTEMPT]]

    assert len(set(starts(0))) == 4
    assert starts(0) == starts(0) != starts(1)


@pytest.mark.parametrize("retries", [1, 3])
def test_a_reply_that_stays_empty_says_so(retries):
    model = scripted(EMPTY)
    result = generate(model, ByteProcessor(), "q", options=GenerationOptions(retries=retries))
    assert (result.text, result.finish_reason, result.stats.retries) == ("", "stop", retries)
    assert len(model.canvases) == ATTEMPT * (retries + 1) and result.stats.steps == [2 * (retries + 1)]
    assert f"before the first word, {retries + 1} times in a row" in result.note


def test_without_retries_the_model_has_its_way():
    model = scripted(*[EMPTY] * STEPS, sure("hello", LENGTH))
    result = generate(model, ByteProcessor(), "q", options=GenerationOptions(retries=0))
    assert (result.text, result.stats.retries, len(model.canvases)) == ("", 0, ATTEMPT)
    assert result.note.startswith("The model ended its reply before the first word;")
    for wrong in (-1, None, 1.5):
        with pytest.raises(PromptError, match="retries"):
            GenerationOptions(retries=wrong)


def test_only_the_first_canvas_and_only_the_models_own_is_denoised_again():
    model = scripted(*[sure("ABCDEFGH", LENGTH)] * STEPS, EMPTY)
    result = generate(model, ByteProcessor(), "q")
    assert (result.text, result.stats.retries, result.stats.steps, result.note) == ("ABCDEFGH", 0, [2, 2], "")
    model = scripted(EMPTY)
    result = generate(model, ByteProcessor(), "q", canvas=Canvas([END, 65], pinned=[True, False]))
    assert (result.text, result.stats.retries) == ("", 0)


def test_in_a_batch_only_empty_rows_are_denoised_again():
    """The first row is done after the first attempt and leaves."""
    other = sure("XXXX", LENGTH)
    model = scripted(*[[sure("one", LENGTH), EMPTY]] * STEPS, *[[other, EMPTY]] * STEPS, [other, sure("two", LENGTH)])
    one, two = generate_batch(model, ByteProcessor(), ["a", "b"], seed=0)
    assert (one.text, one.stats.retries, one.stats.steps) == ("one", 0, [2])
    assert (two.text, two.stats.retries, two.stats.steps) == ("two", 2, [6])


def test_a_cancelled_attempt_is_the_last():
    cancelled = iter([False] * 5 + [True])
    model = scripted(EMPTY)
    result = generate(model, ByteProcessor(), "q", cancel=SimpleNamespace(is_set=lambda: next(cancelled, True)))
    assert (result.finish_reason, result.note) == ("cancelled", "") and len(model.canvases) == ATTEMPT


class ThinkingProcessor(ByteProcessor):
    """Everything before a full stop is a thought."""

    def reply_parser(self, prompt=None):
        kind = ["thinking"]

        def feed(tokens):
            parts = []
            for token in tokens:
                parts.append((kind[0], chr(token)))
                kind[0] = "text" if chr(token) == "." else kind[0]
            return parts

        return SimpleNamespace(feed=feed, preview=lambda tokens: [[] for _ in tokens] or [[]], finish=lambda: [])


@pytest.mark.parametrize(("text", "noted"), [("thinking", True), ("a.answer", False)])
def test_a_thought_that_takes_all_tokens_says_so(text, noted):
    result = generate(scripted(sure(text, LENGTH)), ThinkingProcessor(), "q", max_tokens=2 * LENGTH)
    assert result.finish_reason == "length" and bool(result.note) == noted
    if noted:
        assert result.text == "" and result.thinking == text * 2
        assert result.note == "The thought took all 16 tokens; raise max_tokens, or ask without thinking."
