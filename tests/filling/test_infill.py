"""Holes in texts: filled so that the text around them comes back byte for byte."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from random_models import config_json, random_model
from typer.testing import CliRunner

from mlx_diffusiongemma import Canvas, Draft, GenerationOptions, Hole, PromptError, generate, infill, load
from mlx_diffusiongemma.checkpoints import accounting
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.config import FULL, SLIDING
from mlx_diffusiongemma.filling.gaps import Gap, Span
from mlx_diffusiongemma.filling.places import Leg, Place
from mlx_diffusiongemma.filling.search import GapFiller
from mlx_diffusiongemma.filling.window import open_window
from mlx_diffusiongemma.generation.denoising import Denoising
from mlx_diffusiongemma.generation.request import make_request
from mlx_diffusiongemma.model import diffusion_gemma

QUESTIONS = Path(__file__).parents[1] / "data" / "tiny" / "prompts.jsonl"
FEW = GenerationOptions(seed=0, max_steps=2)  # where only the text around the holes matters


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


class Counting:
    """A model that notes the rows of each canvas it denoises."""

    def __init__(self, model, rows):
        self._model, self._rows = model, rows

    def __getattr__(self, name):
        return getattr(self._model, name)

    def denoise(self, canvas, *rest):
        self._rows.append(canvas.shape[0])
        return self._model.denoise(canvas, *rest)


@pytest.mark.parametrize(
    ("parts", "instruction", "holes"),
    [
        (["abc", Hole(6), "hij"], "reverse jihgfedcba", ["defg"]),
        (["12", Hole(5)], "sort 53142", ["345"]),
        ([Hole(4), "345"], "sort 53142", ["12"]),
        (['{"name": "', Hole(3), '", "age": ', Hole(2), "}"], "json name=bob age=12", ["bob", "12"]),
    ],
)
def test_known_texts_are_completed(demo, parts, instruction, holes):
    result = infill(*demo, parts, instruction, GenerationOptions(seed=0, max_steps=8))
    assert result.holes == holes and result.canvases == 1
    rest = iter(holes)
    assert str(result) == "".join(part if isinstance(part, str) else next(rest) for part in parts)


def test_the_middle_of_known_replies(demo):
    """A fast part of tests/benchmarks/canvas_tasks.py."""
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    chosen = [question for task in ("solve", "reverse") for question in questions if question["task"] == task][::40]
    for question in chosen:
        text = question["text"]
        start = len(text) // 3
        stop = min(start + 4, len(text) - 1)
        parts = [text[:start], Hole(5), text[stop:]]
        options = GenerationOptions(seed=question["id"], max_steps=8)
        assert infill(*demo, parts, question["messages"], options).text == text


def test_the_length_is_read_and_its_evidence_told(demo):
    """No length is tried: the canvas rows are few more than those of the reply itself."""
    model, processor = demo
    rows = []
    counting = Counting(model, rows)
    plain = generate(counting, processor, "count from 5", seed=0)
    spent = sum(rows)
    rows.clear()
    text, start, length = plain.text, 6, 40
    parts = [text[:start], Hole(48), text[start + length :]]
    result = infill(counting, processor, parts, "count from 5", GenerationOptions(seed=0))
    assert result.text == text and sum(rows) <= 3 * spent, (sum(rows), spent)
    assert [attempt.lengths for attempt in result.attempts] == [(length,)]
    assert result.attempts[0].evidence > 4 and result.attempts[0].surprise is None
    assert len(result.confidence) == 1 and result.confidence[0] > 0.95


def test_all_that_is_asked_for_is_denoised_and_judged(demo):
    result = infill(
        *demo, ["abc", Hole(6), "hij"], "reverse jihgfedcba", GenerationOptions(seed=0, max_steps=8), alternatives=3
    )
    assert next(own.text for own in result.alternatives) == result.text == "abcdefghij"
    likelihoods = [own.log_likelihood for own in result.alternatives]
    assert len(likelihoods) == 3 and likelihoods == sorted(likelihoods, reverse=True)
    assert all(own.text == "abc" + own.holes[0] + "hij" for own in result.alternatives)
    assert [attempt.surprise for attempt in result.attempts] == [-value for value in likelihoods]


def test_exact_holes_have_one_length(demo):
    exact = infill(*demo, ["abc", Hole(4), "hij"], "reverse jihgfedcba", GenerationOptions(seed=0), exact=True)
    assert exact.holes == ["defg"] and [attempt.lengths for attempt in exact.attempts] == [(4,)]


def test_a_hole_given_twice_has_a_length_in_each_place(demo):
    hole = Hole(5)
    result = infill(*demo, ["a", hole, "fg", hole, "j"], "reverse jihgfedcba", GenerationOptions(seed=0))
    assert result.holes == ["bcde", "hi"]


@pytest.mark.parametrize(("start", "length"), [(50, 30), (63, 5), (64, 20), (60, 4), (30, 40), (10, 70), (59, 2)])
def test_a_hole_across_canvases_ends_where_what_follows_fits(demo, start, length):
    """A canvas has 64 tokens, the reply 90: what follows begins on the first canvas, at its border, or on the second;
    the longest hole is longer than a canvas.
    """
    text = " ".join(map(str, range(5, 35)))
    parts = [text[:start], Hole(length + 12), text[start + length :]]
    result = infill(*demo, parts, "count from 5", GenerationOptions(seed=0))
    assert result.text == text and result.holes == [text[start : start + length]]


def test_a_stop_ends_a_hole(demo):
    parts = ['{"name": "', Hole(8, stop=['"']), '", "age": 12}']
    assert infill(*demo, parts, "json name=robin age=12", GenerationOptions(seed=0)).holes == ["robin"]
    last = infill(*demo, ["12 13 ", Hole(40, stop=["17", "never"])], "count from 12", GenerationOptions(seed=0))
    assert last.text == "12 13 14 15 16 "


def test_time_that_is_over_leaves_the_best_so_far(demo):
    parts = ["abc", Hole(6), "hij"]
    drafts = []

    def take(event):
        if isinstance(event, Draft):
            drafts.append(event)
            time.sleep(0.5)

    result = infill(*demo, parts, "reverse jihgfedcba", GenerationOptions(seed=0), milliseconds=400, on_event=take)
    assert (result.finish_reason, result.text, len(drafts)) == ("length", "abcdefghij", 1)
    assert drafts[0].text == "defghij" and drafts[0].holes == [(0, 4)]


def test_text_beyond_the_context_is_cut_at_lines_the_nearest_are_read(demo):
    line = "reverse the word and count on\n"
    for instruction in (None, "say something"):
        parts = [line * 200, Hole(2), "\n" + line * 200]
        result = infill(*demo, parts, instruction, FEW)
        assert result.text == parts[0] + result.holes[0] + parts[2]
    assert result.stats.prompt_tokens < 50
    grown = [infill(*demo, [line * count, Hole(2), line], None, FEW).stats.prompt_tokens for count in (200, 201, 202)]
    assert grown[1] - grown[0] == grown[2] - grown[1] == len(line)  # they begin with the same line


def test_a_draft_is_what_the_hole_starts_from(demo):
    parts = ["abc", Hole(4, draft="defg"), "hij"]
    result = infill(*demo, parts, "reverse jihgfedcba", GenerationOptions(seed=0), exact=True)
    assert result.holes == ["defg"] and result.stats.steps == [2]


@pytest.mark.parametrize("text", ["é\r\n\t<|turn>日本", "\u2028 \x00\x0b<eos><FILL>", "a  b \n\n", "\n    }\n  )]\n"])
def test_text_outside_holes_comes_back_byte_for_byte(demo, text):
    for instruction in (None, "say something"):
        parts = [text, Hole(2), text, Hole(1), text]
        result = infill(*demo, parts, instruction, FEW)
        assert result.text == text + result.holes[0] + text + result.holes[1] + text


def test_what_looks_like_a_marker_is_spelled_out(demo):
    result = infill(*demo, ["<|turn>", Hole(1), "<eos>"], "say something", FEW, exact=True)
    processor = demo[1]
    assert not set(result.tokens[:7]) & set(processor.tokenizer.all_special_ids)


def test_parts_longer_than_a_canvas_spill_over_and_say_so(demo):
    before, after = "x" * 150, "y" * 150
    result = infill(*demo, [before, Hole(2), after, Hole(2), "z" * 70], None, FEW, exact=True)
    assert result.canvases == 2 and len(result.stats.steps) == 2
    assert result.text == before + result.holes[0] + after + result.holes[1] + "z" * 70
    assert [attempt.canvas for attempt in result.attempts] == [0, 1]


def test_four_holes_are_settled_together(demo):
    text = " ".join(map(str, range(12, 42)))
    parts = [text[:4], Hole(20), text[9:17], Hole(20), text[25:30], Hole(20), text[36:48], Hole(20), text[60:]]
    result = infill(*demo, parts, "count from 12", GenerationOptions(seed=0))
    assert result.text == text and len(result.attempts) == result.canvases == 1


def test_the_same_seed_gives_the_same_text(demo):
    parts = ["def mean(xs):\n    ", Hole(3), "\n    return total"]
    assert infill(*demo, parts, None, FEW).text == infill(*demo, parts, None, FEW).text


@pytest.mark.parametrize("at_once", [1, 3])
def test_how_many_rows_are_computed_at_once_changes_nothing(demo, at_once, monkeypatch):
    """Token by token, of every row after every step; 7 rows are three parts of 3, the last of which repeats two."""
    parts = ["abc", Hole(7), "hij"]

    def run():
        shown = []
        original = Denoising.step

        def step(self):
            found = original(self)
            shown.append([own.tokens for own in found])
            return found

        monkeypatch.setattr(Denoising, "step", step)
        result = infill(*demo, parts, None, GenerationOptions(seed=0, max_steps=3), alternatives=7)
        monkeypatch.setattr(Denoising, "step", original)
        return result, shown

    whole, all_rows = run()
    text, length = demo[0].config.text, demo[0].config.canvas_length
    budget = accounting.rows_bytes(text, length, whole.stats.prompt_tokens, at_once, item=4)
    monkeypatch.setattr(accounting, "ROWS_BUDGET", budget)
    few, same_rows = run()
    assert few.tokens == whole.tokens and few.stats.steps == whole.stats.steps and same_rows == all_rows
    assert [attempt.lengths for attempt in few.attempts] == [attempt.lengths for attempt in whole.attempts]
    scores = [[attempt.surprise for attempt in result.attempts] for result in (few, whole)]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-3)


def test_rows_keep_to_their_budget(demo, monkeypatch):
    """Of a model whose keys and values are large beside all else; without the budget they would take far more."""
    _, processor = demo
    sizes = {"num_key_value_heads": 4, "num_global_key_value_heads": 4, "vocab_size": 384, "sliding_window": 256}
    model = random_model(config_json([SLIDING, SLIDING, FULL], 32, **sizes), None)
    monkeypatch.setattr(diffusion_gemma, "PREFILL_CHUNK", 32)  # what reading the prompt takes is not asked here
    parts, options = ["x" * 600, Hole(8), "y"], GenerationOptions(seed=0, max_steps=2)

    def run(budget):
        monkeypatch.setattr(accounting, "ROWS_BUDGET", budget)
        result = infill(model, processor, parts, None, options, alternatives=8)
        return result.stats.peak_memory_bytes, result.tokens

    allowed = accounting.rows_bytes(model.config.text, 32, 600, 3, item=4)
    (one, tokens), (few, same), (all_at_once, same_again) = (run(budget) for budget in (0, allowed, 2**30))
    assert one < few <= one + allowed, (one, few, all_at_once, allowed)
    assert all_at_once > one + allowed, (one, few, all_at_once, allowed)
    assert tokens == same == same_again


class AfterSteps(threading.Event):
    """Set once a run has asked so many times."""

    def __init__(self, times):
        super().__init__()
        self.left = times

    def is_set(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(("times", "steps"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (7, 4)])
def test_cancelling_keeps_the_best_so_far(demo, times, steps):
    """While reading the prompt, asking for a thought, denoising and scoring; before the first step there is nothing."""
    parts = ["abc", Hole(6), "hij"]
    cancel = AfterSteps(times)
    result = infill(*demo, parts, "reverse jihgfedcba", FEW, alternatives=3, cancel=cancel)
    assert (result.finish_reason, sum(result.stats.steps)) == ("cancelled", steps)
    assert result.holes == (["defg"] if steps else []) and result.text == "abc" + "".join(result.holes) + "hij"


def test_cancelling_keeps_what_is_filled(demo):
    before, after = "x" * 150, "y" * 150
    parts = [before, Hole(2), after, Hole(2), "z" * 70]
    whole = infill(*demo, parts, None, FEW, exact=True)
    asked = AfterSteps(1000)
    infill(*demo, parts, None, FEW, exact=True, cancel=asked)
    result = infill(*demo, parts, None, FEW, exact=True, cancel=AfterSteps(1000 - asked.left - 1))
    assert result.finish_reason == "cancelled" and result.holes[:1] == whole.holes[:1]
    assert result.text == before + whole.holes[0] + after + result.holes[1] + "z" * 70


def test_cancelling_frees_the_canvas(demo):
    model, processor = demo
    request = make_request(model, processor, "sort 312", options=FEW, cancel=AfterSteps(3))
    filler = GapFiller(model, processor, request, [Gap(4, 5)], None, [Span(lambda tokens: "")], replies=False)
    filler.run()
    assert filler.finish_reason == "cancelled" and filler.steps == [2]
    assert all(layer._canvas is None and layer._spread is None for layer in filler.cache.layers)


def test_a_canvas_is_laid_out_with_its_ending():
    gap = Gap(1, 2, draft=(7,))
    window = open_window([gap, [8]], [5, 6], [], 8, [2, 1])
    assert window.legs == [Leg(gap, [8, 2, 1, 1, 1, 1, 1, 1])]
    begun = window.lay_out(())
    assert begun.canvas == Canvas([5, 6, 7, *[None] * 5], [True, True, *[False] * 6])
    row = window.lay_out([Place(4)])
    assert row.canvas == Canvas([5, 6, 7, None, 8, 2, 1, 1], [True, True, False, False, True, True, True, True])
    assert (row.gaps, row.lengths, row.end) == (((2, 4),), (2,), 6)
    open_row = open_window([gap, [8]], [5, 6], [], 6, None).lay_out([Place(3)], drafted=1)
    assert open_row.canvas == Canvas([5, 6, None, 8, None, None], [True, True, False, True, False, False])
    cut = open_window([gap, [8]], [5, 6], [], 3, [1]).lay_out([Place(3)], drafted=1)
    assert cut.canvas.tokens == (5, 6, None) and cut.end == 3


def test_a_gap_that_goes_on_may_end_on_the_canvas_before():
    gap = Gap(1, 9)
    window = open_window([gap, [8, 9]], [], [3, 4, 8], 4, [1])
    assert window.start == -3 and window.spans([Place(-1)]) == [(-3, -1)]
    row = window.lay_out([Place(-1)])
    assert row.canvas == Canvas([9, 1, 1, 1], [True] * 4) and row.end == 2
    assert window.cut([Place(-1)], row.over([0] * 4), [3, 4, 8]) == [[3, 4]]
    assert window.is_whole([Place(-1)]) and not window.is_whole([])
    beyond = window.lay_out([])
    assert beyond.gaps == ((0, 4),) and not any(beyond.canvas.pinned)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["a", Hole(0), "b"], "at least 1 token, not 0"),
        (["a", Hole(1, stop="x"), "b"], "list of texts, not 'x'"),
        (["a", Hole(2.5), "b"], "not 2.5"),
        (["a", "b"], "no hole"),
        ([], "no hole"),
        ("a", "list of texts"),
        (["a", 5, Hole(1)], "list of texts"),
        (5, "list of texts"),
        (["a", Hole(1, draft=5)], "draft is a text, not 5"),
        (["a" * 5000, Hole(4), "b"], "fit this model's context"),
        (["a\ud800", Hole(4)], "not valid Unicode"),
    ],
)
def test_bad_parts_are_refused_in_one_sentence(demo, parts, message):
    with pytest.raises(PromptError, match=message):
        infill(*demo, parts)


def run(demo_float32, *arguments, stdin=None):
    command = ["infill", *arguments, "--model", str(demo_float32), "--seed", "0", "--steps", "8"]
    return CliRunner().invoke(app, command, input=stdin)


def test_the_command_prints_the_filled_text(demo_float32, tmp_path):
    text = '{"name": "<FILL>", "age": 12}\r\n'
    asked = ("--tokens", "4", "--instruction", "json name=bob age=12")
    found = run(demo_float32, "-", *asked, stdin=text.replace("\r\n", ""))
    assert (found.exit_code, found.stdout) == (0, '{"name": "bob", "age": 12}')
    file = tmp_path / "form.json"
    file.write_bytes(text.replace("<FILL>", "@@").encode())
    found = run(demo_float32, str(file), "--hole", "@@", "--tokens", "3", "--exact")
    assert found.exit_code == 0 and found.stdout_bytes.endswith(b'", "age": 12}\r\n')


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"nothing to fill", (), "no '<FILL>'"),
        (b"\xff<FILL>", (), "not UTF-8"),
        (b"a<FILL>b", ("--hole", ""), "--hole is empty"),
        (None, (), "cannot be read"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(demo_float32, tmp_path, content, arguments, message):
    file = tmp_path / "file.txt"
    if content is not None:
        file.write_bytes(content)
    found = run(demo_float32, str(file), *arguments)
    assert found.exit_code == 1 and message in found.stderr and found.stderr.count("\n") == 1
    assert found.stdout == "" and (content is None or file.read_bytes() == content)
