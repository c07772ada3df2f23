"""What only a canvas can do, measured on the trained demo checkpoint: pinned tokens, infilling, choosing, forms.

    python tests/benchmarks/canvas_tasks.py [--questions 20] [--only infill choose]

Prints each measurement by task. The exit status is 1 where a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from behaviour import DEMO, QUESTIONS, is_right

from mlx_diffusiongemma import (
    Canvas,
    Choice,
    Digits,
    GenerationOptions,
    Hole,
    Text,
    choose,
    fill,
    generate,
    infill,
    load,
)
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.filling.infilling import reply_ending

Question = dict[str, Any]
TASKS = ("sort", "reverse", "json", "count", "solve")
MAX_TOKENS = 192  # three canvases


class Tasks:
    """The measurements: each answers, for one question, whether the model did it."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.answers: dict[int, str] = {}

    def spelled(self, question: Question) -> list[int]:
        """The right reply's tokens, its end included."""
        text = self.processor.tokenizer.encode(question["text"], add_special_tokens=False)
        return [*text, *reply_ending(self.processor, is_reply=True)[:1]]

    def reply(self, question: Question, canvas: Canvas | None = None) -> Any:
        return generate(
            self.model,
            self.processor,
            question["messages"],
            canvas=canvas,
            options=GenerationOptions(seed=question["id"], max_tokens=MAX_TOKENS),
        )

    def plain(self, question: Question) -> bool:
        return is_right(question, self.processor.parse(self.reply(question).tokens))

    def half_pinned(self, question: Question) -> bool:
        """A random half of the right reply is pinned: is the whole right?"""
        tokens, draw = self.spelled(question), random.Random(question["id"])
        pinned = [draw.random() < 0.5 for _ in tokens]
        canvas = Canvas([token if pin else None for token, pin in zip(tokens, pinned, strict=True)], pinned)
        return is_right(question, self.processor.parse(self.reply(question, canvas).tokens))

    def wrong_pinned(self, question: Question) -> bool:
        """One wrong character is pinned: is it kept, and does the rest stay right or make sense of it?"""
        tokens, draw = self.spelled(question), random.Random(question["id"])
        place = draw.randrange(len(tokens) - 1)
        kind = "0123456789" if question["text"][place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
        wrong = draw.choice([letter for letter in kind if letter != question["text"][place]])
        wrong_token = self.processor.tokenizer.encode(wrong, add_special_tokens=False)[0]
        canvas = Canvas([*[None] * place, wrong_token], [*[False] * place, True])
        reply = self.reply(question, canvas).tokens
        assert reply[place] == wrong_token, "a pinned token was changed"
        right = sum(a == b for a, b in zip(reply, tokens[:-1], strict=False))
        return right >= len(tokens) - 1 - 2  # the pinned one, and one more that gives way to it

    def infilled(self, question: Question) -> bool:
        """The middle third is a hole of 48: does exactly what was there come back?"""
        text = question["text"]
        start = len(text) // 3
        stop = max(2 * len(text) // 3, start + 1)
        parts = [text[:start], Hole(48), text[stop:]]
        options = GenerationOptions(seed=question["id"])
        return infill(self.model, self.processor, parts, question["messages"], options).text == text

    def chosen(self, question: Question) -> bool:
        """Does the most probable of four replies, one of them the model's own, agree with what it generates?"""
        reply = self.reply(question).text
        draw = random.Random(question["id"])
        options = {reply, question["text"]}
        while len(options) < 4:
            options.add(changed(question["text"], draw))
        found = choose(self.model, self.processor, question["messages"], sorted(options), seed=question["id"])
        return max(found, key=found.get) == reply

    def filled(self, question: Question) -> bool:
        """A form always parses; are its values right?"""
        right = json.loads(question["text"])
        names = [right["name"], changed(right["name"], random.Random(1)), "bob"]
        text_or_choice = Text(8) if question["id"] % 2 else Choice(list(dict.fromkeys(names)))
        form = fill(
            self.model,
            self.processor,
            '{"name": "{{name}}", "age": {{age}}}',
            {"name": text_or_choice, "age": Digits(3)},
            GenerationOptions(seed=question["id"]),
            instruction=question["messages"],
        )
        return json.loads(form.text) == right


def changed(text: str, draw: random.Random) -> str:
    """`text` with a character replaced, left out, or two swapped."""
    letters, kind = list(text), draw.randrange(3)
    one, other = draw.randrange(len(text)), draw.randrange(len(text))
    if kind == 0:
        letters[one] = draw.choice("0123456789" if letters[one].isdigit() else "abcdefghij")
    elif kind == 1:
        letters[one], letters[other] = letters[other], letters[one]
    elif len(letters) > 1:
        del letters[one]
    return "".join(letters)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=20, help="of each task")
    parser.add_argument("--only", nargs="*", help="measurements")
    arguments = parser.parse_args()
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(DEMO, Path(scratch) / "demo", bits=None, dtype="float32")
        tasks = Tasks(*load(Path(scratch) / "demo"))
    short = ("sort", "reverse", "json")
    measurements: dict[str, tuple[Callable[[Question], bool], tuple[str, ...], float]] = {
        "plain": (tasks.plain, TASKS, 0.0),
        "half_pinned": (tasks.half_pinned, TASKS, 0.0),
        "wrong_pinned": (tasks.wrong_pinned, ("sort", "reverse", "json", "count"), 0.9),
        "infill": (tasks.infilled, TASKS, 0.95),
        "choose": (tasks.chosen, short, 0.95),
        "fill": (tasks.filled, ("json",), 0.95),
    }
    shares: dict[str, float] = {}
    for name, (measure, of_tasks, _) in measurements.items():
        if not arguments.only or name in arguments.only:
            shares[name] = measured(name, measure, questions, of_tasks, arguments.questions)
    held = all(share >= measurements[name][2] for name, share in shares.items())
    return 0 if held and shares.get("half_pinned", 1.0) >= shares.get("plain", 0.0) else 1


def measured(
    name: str, measure: Callable[[Question], bool], questions: list[Question], tasks: tuple[str, ...], count: int
) -> float:
    """Print the share of `count` questions of each task that `measure` finds right; returns the share of all."""
    counts = {}
    for task in tasks:
        chosen = [question for question in questions if question["task"] == task and len(question["text"]) > 2][:count]
        counts[task] = (sum(map(measure, chosen)), len(chosen))
    right, total = (sum(column) for column in zip(*counts.values(), strict=True))
    by_task = "  ".join(f"{task} {good}/{of}" for task, (good, of) in counts.items())
    print(f"{name:13} {right / total:6.1%}  {by_task}", flush=True)
    return right / total


if __name__ == "__main__":
    sys.exit(main())
