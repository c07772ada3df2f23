"""What an editor does all day: the same request again, a keystroke later. Only what is new is read, and it is seen."""

from __future__ import annotations

import threading
import time

import pytest

from mlx_diffusiongemma import (
    BusyError,
    Choice,
    Digits,
    GenerationOptions,
    Hole,
    PromptError,
    Text,
    edit,
    fill,
    infill,
    load,
    stream,
)
from mlx_diffusiongemma.events import Commit, Done, Draft, Prefill

FEW = GenerationOptions(max_steps=4, seed=0)
LONG = "".join(f"line {number}: reverse the word and count on\n" for number in range(52))  # 2,000 tokens and more


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def timed(call, *arguments, **options):
    """The result, seconds to the first draft, and all events."""
    events, first = [], []
    started = time.perf_counter()

    def take(event):
        events.append(event)
        if isinstance(event, Draft) and not first:
            first.append(time.perf_counter() - started)

    return call(*arguments, on_event=take, **options), first[0], events


def test_a_second_infill_after_a_long_prefix_is_ten_times_sooner(demo):
    cache = demo[0].make_cache()
    parts = [LONG, Hole(8), "\nthe end"]
    infill(*demo, ["warm", Hole(2), "up"], None, FEW)
    once, slow, events = timed(infill, *demo, parts, None, FEW, cache=cache)
    assert once.stats.prompt_tokens > 2000 and once.stats.cached_tokens == 0
    later = [timed(infill, *demo, parts, None, FEW, cache=cache) for _ in range(3)]
    again, quick = later[0][0], min(seconds for _, seconds, _ in later)
    assert again.stats.cached_tokens == again.stats.prompt_tokens
    assert again.text == once.text == infill(*demo, parts, None, FEW).text
    assert slow > 10 * quick, (slow, quick)
    changed, _, _ = timed(infill, *demo, [LONG + "a", Hole(8), "\nthe end!"], None, FEW, cache=cache)
    assert changed.stats.prompt_tokens - changed.stats.cached_tokens == 1
    assert changed.text == infill(*demo, [LONG + "a", Hole(8), "\nthe end!"], None, FEW).text
    assert isinstance(events[0], Prefill) and isinstance(events[-1], Done)


CALLS = {
    "infill": lambda demo, **o: infill(*demo, ["count from 5: ", Hole(4), ", 7, ", Hole(3), "."], None, FEW, **o),
    "a reply": lambda demo, **o: infill(*demo, ["ab", Hole(4), "ba"], "reverse abab", FEW, **o),
    "two canvases": lambda demo, **o: infill(*demo, ["a", Hole(40), "b" * 40, Hole(30), "c"], None, FEW, **o),
    "edit": lambda demo, **o: edit(*demo, "one two three", (4, 7), "make it 2", 0.7, FEW, **o),
    "fill": lambda demo, **o: fill(
        *demo,
        '{"a": "{{a}}", "n": {{n}}, "b": "{{b}}"}',
        {"a": Text(3), "n": Digits(2), "b": Choice(["x", "yy"])},
        FEW,
        instruction="json a=bob n=12",
        **o,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_commits_join_to_the_text_and_drafts_begin_with_them(demo, name):
    events = []
    result = CALLS[name](demo, on_event=events.append)
    commits = [event for event in events if isinstance(event, Commit)]
    assert "".join(commit.text for commit in commits) == result.text
    assert isinstance(events[-1], Done) and events[-1].stats == result.stats
    assert events[-1].seed == result.seed == 0
    last = None
    for event in events:
        if isinstance(event, Draft):
            assert event != last  # nothing is shown twice
            last = event
            assert len(event.tokens) == len(event.accepted) == len(event.entropy) == len(event.pieces)
            assert "".join(event.pieces) == event.text
        elif isinstance(event, Commit) and event.tokens:
            assert last is not None and last.tokens[: len(event.tokens)] == event.tokens
            if name != "fill":  # whose text fields end where a string does
                assert last.text.startswith(event.text) or event.text.startswith(last.text)  # up to the canvas's end


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("drafts", [1, 5])
def test_commits_join_to_the_text_where_it_was_cancelled_too(demo, name, drafts):
    events, cancel = [], threading.Event()

    def take(event):
        events.append(event)
        if sum(isinstance(each, Draft) for each in events) == drafts:
            cancel.set()

    result = CALLS[name](demo, on_event=take, cancel=cancel)
    assert "".join(event.text for event in events if isinstance(event, Commit)) == result.text
    assert result.finish_reason == events[-1].finish_reason
    assert result.finish_reason == "cancelled" or drafts > 1  # one is done after as many


@pytest.mark.parametrize("name", CALLS)
def test_a_kept_cache_changes_nothing_but_what_is_encoded(demo, name):
    cache, plain = demo[0].make_cache(), CALLS[name](demo)
    first, again = CALLS[name](demo, cache=cache), CALLS[name](demo, cache=cache)
    assert plain.text == first.text == again.text
    assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, again.stats.prompt_tokens)
    # A reply in between, as an editor with a chat beside it would ask for.
    for _ in stream(*demo, "sort 312", options=FEW, cache=cache):
        pass
    assert CALLS[name](demo, cache=cache).text == plain.text


@pytest.mark.parametrize("name", CALLS)
def test_a_cache_in_use_is_refused(demo, name):
    cache = demo[0].make_cache()
    events = stream(*demo, "sort 312", cache=cache)
    next(events)
    with pytest.raises(BusyError, match="in use"):
        CALLS[name](demo, cache=cache)
    events.close()
    CALLS[name](demo, cache=cache)


@pytest.mark.parametrize("name", CALLS)
def test_the_seed_is_taken_and_reported(demo, name):
    parts = ["def mean(xs):\n    ", Hole(3), "\n    return total"]
    results = [infill(*demo, parts, None, GenerationOptions(max_steps=4), seed=seed) for seed in (7, 7)]
    assert results[0].seed == 7 and results[0].text == results[1].text


def test_what_the_callback_raises_ends_the_request_and_frees_it(demo):
    cache = demo[0].make_cache()

    def stop(event):
        if isinstance(event, Draft):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CALLS["infill"](demo, cache=cache, on_event=stop)
    assert all(layer._canvas is None and layer._spread is None for layer in cache.layers)
    CALLS["infill"](demo, cache=cache)


def test_max_tokens_bounds_the_holes_together(demo):
    parts = ["count: ", Hole(4), ", 7, ", Hole(4), "."]
    for most in (1, 3, 5):
        result = infill(*demo, parts, None, GenerationOptions(max_steps=4, seed=0, max_tokens=most))
        assert sum(len(demo[1].tokenizer.encode(hole, add_special_tokens=False)) for hole in result.holes) <= most
        assert result.finish_reason == ("length" if most == 1 else "stop")
        assert result.text.startswith("count: ") and result.text.endswith(".")
    short = GenerationOptions(max_steps=4, seed=0, max_tokens=2)
    messages = [{"role": "user", "content": "json name=robin age=12"}]
    kept = edit(*demo, '{"name": "tom", "age": 12}', (10, 13), messages, 0.7, short)
    assert (kept.text, kept.diff, kept.finish_reason) == ('{"name": "tom", "age": 12}', "", "length")


def test_cancelled_before_it_begins_it_computes_nothing(demo):
    cancel = threading.Event()
    cancel.set()
    result = CALLS["infill"](demo, cancel=cancel)
    assert result.finish_reason == "cancelled" and result.holes == [] and result.stats.steps == []
    assert result.text == "count from 5: , 7, ."
    with pytest.raises(PromptError, match="seed must be"):
        infill(*demo, ["a", Hole(2)], seed=-1)


def test_a_hole_at_the_end_is_bounded_by_its_own_tokens(demo):
    def filled(most):
        options = GenerationOptions(max_steps=4, seed=3, max_tokens=most)
        return infill(*demo, ["12 13 14 ", Hole(4)], options=options)

    assert filled(4).holes == filled(1024).holes != [""]
    assert filled(4).finish_reason == "stop" and filled(4).stats.generated_tokens <= 4
