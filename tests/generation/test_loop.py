"""The loop by itself: steps, stopping, commits, events and cancelling, on a model whose logits are queued."""

import gc
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from scripted import END, ByteProcessor, ScriptedModel, sure, unsure

from mlx_diffusiongemma import Canvas, CanvasError, GenerationOptions, PromptError, generate, generate_batch, stream
from mlx_diffusiongemma.events import Commit, Done, Draft, Prefill

LENGTH = 8


def scripted(*rows_of_steps, length=LENGTH):
    """One argument per step: logits of one row [L, V], or a list of rows."""
    script = [mx.stack(step) if isinstance(step, list) else step[None] for step in rows_of_steps]
    return ScriptedModel(script, length)


def test_events_come_in_order_and_the_last_draft_begins_with_the_commit():
    model = scripted(unsure(LENGTH), sure("hello", LENGTH))
    events = list(stream(model, ByteProcessor(), "hi", seed=1))
    kinds = [type(event) for event in events]
    assert kinds == [Prefill, Draft, Draft, Draft, Commit, Done]
    commit, draft, done = events[-2], events[-3], events[-1]
    assert commit.text == "hello" and draft.tokens[: len(commit.tokens)] == commit.tokens
    assert draft.text == "hello" and len(draft.tokens) == len(draft.accepted) == len(draft.entropy) == LENGTH
    assert done.finish_reason == "stop"
    assert done.stats.steps == [3] and done.stats.prompt_tokens == 2 and done.stats.generated_tokens == 5


def test_a_canvas_stops_once_stable_and_confident():
    """Certain from step 1: step 2 is the first that equals the one before."""
    model = scripted(sure("ok", LENGTH))
    assert generate(model, ByteProcessor(), "q").stats.steps == [2]
    model = scripted(sure("ok", LENGTH))
    options = GenerationOptions(stability=3)
    assert generate(model, ByteProcessor(), "q", options=options).stats.steps == [4]
    model = scripted(sure("ok", LENGTH))
    assert generate(model, ByteProcessor(), "q", options=GenerationOptions(stability=0)).stats.steps == [1]


def test_a_change_of_the_argmax_starts_the_count_again():
    model = scripted(sure("aa", LENGTH), sure("ab", LENGTH), sure("aa", LENGTH), sure("aa", LENGTH))
    assert generate(model, ByteProcessor(), "q").stats.steps == [4]


def test_what_is_committed_is_the_argmax_not_the_sample():
    """Logits so flat that samples differ from the argmax almost everywhere."""
    faint = 0.5 * sure("argmax!", LENGTH, sharpness=1.0)
    result = generate(scripted(faint), ByteProcessor(), "q", seed=3)
    assert result.text == "argmax!" and result.stats.steps == [8]


def test_the_last_step_neither_draws_nor_conditions():
    model = scripted(unsure(LENGTH))
    generate(model, ByteProcessor(), "q", options=GenerationOptions(max_steps=3, max_tokens=LENGTH))
    assert model.draws == [True, True, False]
    assert model.conditions[0] is None and model.conditions[1] is not None


def test_the_temperature_falls_linearly_from_the_first_step():
    model = scripted(unsure(LENGTH))
    generate(model, ByteProcessor(), "q", options=GenerationOptions(max_steps=4, max_tokens=LENGTH))
    assert np.allclose(model.temperatures, [0.8, 0.7, 0.6, 0.5])


def test_positions_that_are_not_accepted_are_renoised_every_step():
    """The first half is certain, the rest is not: only the first half survives into the next canvas."""
    half = mx.concatenate([sure("abcd", 4), unsure(4)])
    model = scripted(half)
    drafts = [e for e in stream(model, ByteProcessor(), "q", seed=0, max_tokens=LENGTH) if isinstance(e, Draft)]
    canvases = np.array(mx.concatenate(model.canvases))
    assert (canvases[1:, :4] == np.frombuffer(b"abcd", np.uint8)).all()
    assert len({tuple(row) for row in canvases[1:, 4:].tolist()}) == len(canvases) - 1
    assert drafts[0].accepted[:4] == [True] * 4 and sum(drafts[0].accepted) == 5  # one more fits the bound


def test_canvases_follow_until_an_end_token():
    model = scripted(sure("ABCDEFGH", LENGTH), sure("ABCDEFGH", LENGTH), sure("IJ", LENGTH))
    events = list(stream(model, ByteProcessor(), "q"))
    commits = [event for event in events if isinstance(event, Commit)]
    assert [commit.text for commit in commits] == ["ABCDEFGH", "IJ"]
    assert [commit.canvas for commit in commits] == [0, 1]
    cache = model.caches[0]
    assert cache.encoded == [[[ord("q")]], [list(b"ABCDEFGH")]]  # the last canvas is never encoded
    assert events[-1].stats.steps == [2, 2]


@pytest.mark.parametrize(("max_tokens", "text", "reason"), [(3, "ABC", "length"), (11, "ABCDEFGHABC", "length")])
def test_max_tokens_cuts_inside_a_canvas(max_tokens, text, reason):
    result = generate(scripted(sure("ABCDEFGH", LENGTH)), ByteProcessor(), "q", max_tokens=max_tokens)
    assert result.text == text and result.finish_reason == reason and result.stats.generated_tokens == max_tokens


def test_a_reply_that_ends_exactly_at_max_tokens_is_finished():
    result = generate(scripted(sure("ABC", LENGTH)), ByteProcessor(), "q", max_tokens=3)
    assert result.text == "ABC" and result.finish_reason == "stop"


def test_the_context_ends_a_reply():
    model = ScriptedModel([sure("ABCDEFGH", LENGTH)[None]], LENGTH, context=20)
    result = generate(model, ByteProcessor(), "qqqq")
    assert result.text == "ABCDEFGH" * 2 and result.finish_reason == "length"
    with pytest.raises(PromptError, match=r"13 tokens.*at most 12"):
        generate(model, ByteProcessor(), "q" * 13)


@pytest.mark.parametrize(
    ("stop", "text"), [("CD", "AB"), ("GHAB", "ABCDEF"), ("zz", "ABCDEFGH" * 2), (("HA", "BC"), "A")]
)
def test_stop_strings_end_the_reply_even_across_canvases(stop, text):
    options = GenerationOptions(stop=stop, max_tokens=16)
    result = generate(scripted(sure("ABCDEFGH", LENGTH)), ByteProcessor(), "q", options=options)
    assert result.text == text
    assert result.finish_reason == ("length" if stop == "zz" else "stop")
    assert result.stop_string == {"zz": None, ("HA", "BC"): "BC"}.get(stop, stop)


def test_text_that_may_become_a_stop_string_is_held_back():
    options = GenerationOptions(stop=("HX",), max_tokens=16)
    model = scripted(sure("ABCDEFGH", LENGTH))
    commits = [e for e in stream(model, ByteProcessor(), "q", options=options) if isinstance(e, Commit)]
    assert [commit.text for commit in commits] == ["ABCDEFG", "HABCDEFGH"]


def test_draws_depend_on_seed_row_canvas_and_step_only():
    def canvases(seed, prompts, **options):
        model = scripted([unsure(LENGTH)] * len(prompts))
        settings = GenerationOptions(max_steps=3, max_tokens=2 * LENGTH, **options)
        list(generate_batch(model, ByteProcessor(), prompts, options=settings, seed=seed))
        return np.array(mx.stack(model.canvases))

    single = canvases(7, ["a"])
    assert (single == canvases(7, ["another prompt"])).all()
    assert (single[:, 0] == canvases(7, ["a", "b"])[:, 0]).all()
    assert len({tuple(row) for row in single[:, 0].tolist()}) == len(single)
    assert (single != canvases(8, ["a"])).any()
    both = canvases(7, ["a", "a"])
    assert (both[:, 0] != both[:, 1]).any()


@pytest.mark.parametrize("prompts", ["sort", b"sort", {"a": 1}, 5, None])
def test_a_batch_is_a_list(prompts):
    with pytest.raises(PromptError, match="A batch is a list of prompts, not a"):
        generate_batch(scripted(unsure(LENGTH)), ByteProcessor(), prompts)


def test_a_finished_row_leaves_the_batch():
    fast, slow = sure("fast", LENGTH), sure("slow", LENGTH)
    model = scripted([fast, unsure(LENGTH)], [fast, unsure(LENGTH)], [sure("XXXX", LENGTH), slow])
    results = list(generate_batch(model, ByteProcessor(), ["a", "bb"], seed=0))
    assert [(result.index, result.text, result.stats.steps) for result in results] == [
        (0, "fast", [2]),
        (1, "slow", [4]),
    ]
    assert model.rows_settled == 2 + 4
    assert [cache.released > 0 for cache in model.caches] == [True, True]


def test_waiting_prompts_take_the_place_of_finished_ones():
    """Replies of one and of three canvases, two at a time: whoever is done makes room, and results come as they end."""
    one, three = sure("one", LENGTH), sure("ABCDEFGH", LENGTH)
    rows = [three, one, one, one]
    model = ScriptedModel([mx.stack(rows)], LENGTH)
    settings = GenerationOptions(max_tokens=3 * LENGTH)
    results = list(generate_batch(model, ByteProcessor(), ["a", "b", "c", "d"], options=settings, seed=0, rows=2))
    assert [result.index for result in results] == [1, 2, 0, 3] or [result.index for result in results] == [1, 2, 3, 0]
    assert sorted(result.text for result in results) == ["ABCDEFGH" * 3, "one", "one", "one"]
    assert model.rows_settled == 3 * 2 + 3 * 2 and model.most_rows == 2


def test_results_come_while_others_are_written():
    rows = [sure("one", LENGTH), sure("ABCDEFGH", LENGTH)]
    model = ScriptedModel([mx.stack(rows)], LENGTH)
    results = generate_batch(model, ByteProcessor(), ["a", "b"], max_tokens=40 * LENGTH, seed=0)
    assert next(results).text == "one" and len(model.canvases) < 10
    results.close()
    assert all(cache.released for cache in model.caches)


def test_pinned_positions_never_change_and_take_no_part_in_stopping():
    """The pinned position wants to be something else, with great uncertainty; the free ones are certain."""
    logits = mx.concatenate([sure("a", 1), unsure(1), sure("cd", LENGTH - 2)])
    canvas = Canvas([None, ord("Z")], pinned=[False, True])
    model = scripted(logits)
    result = generate(model, ByteProcessor(), "q", canvas=canvas, max_tokens=LENGTH)
    assert result.text == "aZcd" and result.stats.steps == [2]
    assert (mx.concatenate(model.canvases)[:, 1] == ord("Z")).all()


def test_an_end_token_cuts_off_what_is_pinned_after_it():
    canvas = Canvas([ord("h"), END, ord("x")], pinned=[True] * 3)
    assert generate(scripted(sure("abcdef", LENGTH)), ByteProcessor(), "q", canvas=canvas).text == "h"


def test_a_starting_canvas_is_used_and_noise_fills_the_rest():
    model = scripted(sure("ok", LENGTH))
    generate(model, ByteProcessor(), "q", canvas=Canvas([65, None, 67]), seed=5)
    first = model.canvases[0][0].tolist()
    plain = scripted(sure("ok", LENGTH))
    generate(plain, ByteProcessor(), "q", seed=5)
    noise = plain.canvases[0][0].tolist()
    assert first == [65, noise[1], 67, *noise[3:]]


def test_cancel_stops_within_a_step():
    cancel = threading.Event()
    model = scripted(unsure(LENGTH))
    events = []
    for event in stream(model, ByteProcessor(), "q", cancel=cancel):
        events.append(event)
        if isinstance(event, Draft):
            cancel.set()
    assert [type(event) for event in events] == [Prefill, Draft, Done]
    assert events[-1].finish_reason == "cancelled"
    assert generate(model, ByteProcessor(), "q", cancel=cancel).finish_reason == "cancelled"


def test_closing_the_iterator_frees_the_canvas():
    model = scripted(unsure(LENGTH))
    events = stream(model, ByteProcessor(), "q")
    next(events), next(events)
    events.close()
    gc.collect()
    assert model.caches[0].released == 1


def test_events_can_be_taken_from_another_thread():
    model = scripted(unsure(LENGTH))
    events = stream(model, ByteProcessor(), "q", max_tokens=LENGTH)
    next(events), next(events)
    rest = []
    thread = threading.Thread(target=lambda: rest.extend(events))
    thread.start()
    thread.join()
    assert isinstance(rest[-1], Done)


def test_options_left_open_are_the_checkpoints():
    model = scripted(unsure(LENGTH))
    result = generate(model, ByteProcessor(), "q", options=GenerationOptions(max_tokens=LENGTH))
    assert result.stats.steps == [model.options.max_steps]
    model = scripted(unsure(4), length=4)
    model.config = replace(model.config, canvas_length=LENGTH)
    generate(model, ByteProcessor(), "q", options=GenerationOptions(max_tokens=4, canvas_length=4))
    assert model.canvases[-1].shape == (1, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_steps": 0},
        {"max_steps": 2.5},
        {"entropy_bound": -1},
        {"t_max": 0.1, "t_min": 0.2},
        {"stability": -1},
        {"confidence": float("nan")},
        {"stop": ("",)},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": 5},
        {"end_tokens": 5},
        {"end_tokens": ["a"]},
        {"end_tokens": [-1]},
        {"t_max": 0.0, "t_min": 0.0},
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(PromptError):
        GenerationOptions(**wrong)


def test_wrong_canvases_are_refused():
    model = scripted(unsure(LENGTH))
    with pytest.raises(CanvasError, match="pinned but has no token"):
        Canvas([None], pinned=[True])
    with pytest.raises(CanvasError, match="2 tokens but 1 pin"):
        Canvas([1, 2], pinned=[True])
    with pytest.raises(CanvasError, match="id 999"):
        generate(model, ByteProcessor(), "q", canvas=Canvas([999]))
    with pytest.raises(CanvasError, match="more than max_tokens"):
        generate(model, ByteProcessor(), "q", canvas=Canvas([5] * 9), max_tokens=8)
    with pytest.raises(PromptError, match="canvas_length is 99"):
        generate(model, ByteProcessor(), "q", options=GenerationOptions(canvas_length=99))
    with pytest.raises(PromptError, match="empty"):
        generate(model, ByteProcessor(), "")
    assert END in model.options.end_tokens
