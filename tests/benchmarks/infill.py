"""Holes that find their own length, and edits: how many come out exactly right, and what they cost.

    python tests/benchmarks/infill.py [--checkpoint DIR] [--tasks 100] [--only holes several edits judges]

Without a checkpoint the trained demo is measured, else one of its size whose prompts are `follow ab bc … from a 20`.
Tasks are made of replies that the checkpoint gets right in chat: their middles of 1 to 40 tokens become holes of 48,
on one canvas and across canvases; or something in them is changed, left out, doubled, renamed or swapped, and the edit
must bring it back. Canvas rows are compared with those of the plain replies. The exit status is 1 where a bar does not
hold: 95 % right, at most 3 times the rows, and a first draft after one step; nothing outside a span ever moves.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from behaviour import DEMO

from mlx_diffusiongemma import Draft, GenerationOptions, Hole, edit, generate, infill, load
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.filling.gaps import text_tokens
from mlx_diffusiongemma.filling.infilling import reply_ending
from mlx_diffusiongemma.filling.scoring import FilledCanvas, look_at, read_on
from mlx_diffusiongemma.generation.denoising import Denoising

LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
MOST, ROOM = 40, 48  # tokens of a middle, and of its hole
OPTIONS = GenerationOptions(max_tokens=192)
Draw = random.Random


@dataclass(frozen=True)
class Task:
    """A prompt, the reply that the model gives, and the canvas rows that this takes."""

    prompt: str
    text: str
    rows: int


class Rows:
    """A model that counts the canvas rows it computes: a step that is prepared and then not needed is none."""

    def __init__(self, model: Any) -> None:
        self._model, self.rows = model, 0
        dispatched = Denoising._dispatched

        def counted(run: Denoising, pending: Any) -> Any:
            self.rows += len(pending.after.jobs) if pending else 0
            return dispatched(run, pending)

        Denoising._dispatched = counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, canvas: mx.array, *rest: Any) -> mx.array:
        _, *condition = rest
        self.rows += 0 if condition else canvas.shape[0]  # what the loop computes is counted where it is dispatched
        return self._model.denoise(canvas, *rest)

    def taken(self) -> int:
        """The rows since the last time this was asked."""
        rows, self.rows = self.rows, 0
        return rows


def demo_questions(draw: Draw) -> Iterator[tuple[str, str]]:
    """Prompts that the demo knows, and their replies."""
    while True:
        for _ in range(3):
            first = draw.randrange(1, 60)
            yield f"count from {first}", " ".join(map(str, range(first, first + 30)))
        name, age = "".join(draw.choices(LETTERS, k=draw.randint(3, 7))), draw.randint(10, 99)
        yield f"json name={name} age={age}", f'{{"name": "{name}", "age": {age}}}'
        word = "".join(draw.choices(LETTERS, k=draw.randint(6, 12)))
        yield f"reverse {word}", word[::-1]


def chain_questions(draw: Draw) -> Iterator[tuple[str, str]]:
    """Prompts to follow pairs of letters from one on, and the only right replies."""
    while True:
        letters = draw.sample(LETTERS, draw.randint(5, 9))
        count, first = draw.randint(20, 40), draw.randrange(len(letters))
        pairs = [one + other for one, other in zip(letters, letters[1:] + letters[:1], strict=True)]
        reply = "".join(letters[(first + place) % len(letters)] for place in range(count))
        yield f"follow {' '.join(sorted(pairs))} from {letters[first]} {count}", reply


class Measurements:
    """What is measured: each takes tasks and prints what it finds; whether its bars hold comes back."""

    def __init__(self, model: Rows, processor: Any, tasks: list[Task]) -> None:
        self.model, self.processor, self.tasks = model, processor, tasks

    def holes(self) -> bool:
        """One hole of unknown length; on one canvas, and across canvases."""
        length = self.model.options.canvas_length
        held, first_drafts = True, []
        shares: dict[str, list[tuple[bool, int, int]]] = {}
        for number, task in enumerate(self.tasks):
            draw = Draw(number)
            middle = draw.randint(1, min(MOST, len(task.text) - 2))
            start = draw.randint(0, len(task.text) - middle - 1)
            parts = [task.text[:start], Hole(ROOM), task.text[start + middle :]]
            drafts: list[int] = []

            def note(event: object, drafts: list[int] = drafts) -> None:
                if isinstance(event, Draft) and not drafts:
                    drafts.append(event.step)

            self.model.taken()
            found = infill(self.model, self.processor, parts, task.prompt, seed=number, on_event=note)
            assert found.text.startswith(parts[0]) and found.text.endswith(parts[2])
            first_drafts += drafts
            kind = "one canvas" if start // length == (start + middle) // length else "across canvases"
            shares.setdefault(kind, []).append((found.text == task.text, self.model.taken(), task.rows))
        for kind, results in shares.items():
            held = shown(f"one hole, {kind}", results) and held
        print(f"first drafts come after step {max(first_drafts)} at the latest")
        return held and max(first_drafts) == 1

    def several(self) -> bool:
        """Four holes in one text."""
        results = []
        for number, task in enumerate(self.tasks):
            if len(task.text) < 16:
                continue
            draw = Draw(number)
            cuts = sorted(draw.sample(range(1, len(task.text)), 8))
            if any(stop - start > MOST for start, stop in zip(cuts[::2], cuts[1::2], strict=True)):
                continue
            parts: list[str | Hole] = []
            done = 0
            for start, stop in zip(cuts[::2], cuts[1::2], strict=True):
                parts += [task.text[done:start], Hole(ROOM)]
                done = stop
            self.model.taken()
            found = infill(self.model, self.processor, [*parts, task.text[done:]], task.prompt, seed=number)
            results.append((found.text == task.text, self.model.taken(), task.rows))
        return shown("four holes", results)

    def edits(self) -> bool:
        """An old text becomes the right one, within a span and without one."""
        results: dict[str, list[tuple[bool, int, int]]] = {}
        kinds = (changed, doubled, left_out, renamed, swapped)
        for number, task in enumerate(self.tasks):
            draw, damage = Draw(number), kinds[number % len(kinds)]
            old, start, stop = damage(task.text, draw)
            is_whole = number // len(kinds) % 2
            span = None if is_whole else (max(0, start - draw.randrange(4)), min(len(old), stop + draw.randint(1, 4)))
            messages = [{"role": "user", "content": task.prompt}]
            self.model.taken()
            found = edit(self.model, self.processor, old, span, messages, seed=number)
            if span:
                assert found.text.startswith(old[: span[0]]) and found.text.endswith(old[span[1] :])
            kind = f"edits, {'whole text' if is_whole else 'a span'}"
            results.setdefault(kind, []).append((found.text == task.text, self.model.taken(), task.rows))
        held = [shown(kind, own) for kind, own in results.items()]
        return all(held)

    def judges(self) -> bool:
        """Of the right filling and a wrong one, which do the two judges prefer, and how often do they agree?"""
        end, length = reply_ending(self.processor, is_reply=True), self.model.options.canvas_length
        verdicts = []
        for number, task in enumerate(self.tasks):
            draw, text = Draw(number), text_tokens(self.processor, task.text)
            middle = draw.randint(1, min(MOST, len(text) - 2))
            start = draw.randint(0, len(text) - middle - 1)
            right = text[start : start + middle]
            wrong = [*right, *right] if number % 2 else [token for token in right if token != right[0]]
            rows = []
            for filling in (right, wrong):
                whole = [*text[:start], *filling, *text[start + middle :], end[0]]
                canvas = [*whole, *[end[-1]] * length][:length]
                rows.append(FilledCanvas(canvas, whole[:length], [(start, start + len(filling))], [False]))
            if max(start + middle, start + len(wrong)) >= length - 4:
                continue
            cache = self.model.make_cache()
            self.model.encode(mx.array([self.processor.prompt(task.prompt).tokens]), cache)
            read = [-sum(read_on(self.model, cache, row.text)[start:]) for row in rows]
            looked = look_at(self.model, cache, rows, number)
            verdicts.append((read[0] < read[1], looked[0] < looked[1]))
        count = len(verdicts)
        by_encoder, by_canvas = (sum(column) / count for column in zip(*verdicts, strict=True))
        agreeing = sum(one == other for one, other in verdicts) / count
        print(f"judges: encoder right {by_encoder:.1%}, canvas {by_canvas:.1%}, agree {agreeing:.1%} of {count}")
        return True


def changed(text: str, draw: Draw) -> tuple[str, int, int]:
    """Another word in a word's place. Like the others: the old text, and where it differs."""
    start, stop = draw.choice(words(text))
    word = "".join(draw.choice(LETTERS if c.isalpha() else DIGITS) if c.isalnum() else c for c in text[start:stop])
    return text[:start] + word + text[stop:], start, stop


def doubled(text: str, draw: Draw) -> tuple[str, int, int]:
    start, stop = draw.choice(words(text))
    return text[:stop] + text[start:], start, stop


def left_out(text: str, draw: Draw) -> tuple[str, int, int]:
    start, stop = draw.choice(words(text))
    return text[:start] + text[stop:], start, start


def renamed(text: str, draw: Draw) -> tuple[str, int, int]:
    letter = draw.choice([own for own in text if own.isalnum()])
    other = draw.choice([own for own in LETTERS + DIGITS if own not in text] or ["?"])
    return text.replace(letter, other), text.index(letter), text.rindex(letter) + 1


def swapped(text: str, draw: Draw) -> tuple[str, int, int]:
    place = draw.randrange(len(words(text)) - 1)
    (start, middle), (_, stop) = words(text)[place : place + 2]
    return text[:start] + text[middle:stop] + text[start:middle] + text[stop:], start, stop


def words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text are, each with the space behind it; the letters where there are few words."""
    found = [match.span() for match in re.finditer(r"\S+\s*", text)]
    return found if len(found) > 3 else [(place, place + 1) for place in range(len(text))]


def shown(name: str, results: list[tuple[bool, int, int]]) -> bool:
    """Print the share that is right and the cost; whether both bars hold."""
    right = sum(own for own, _, _ in results) / len(results)
    ratio = sum(rows for _, rows, _ in results) / sum(plain for _, _, plain in results)
    print(f"{name:28} {right:6.1%} of {len(results):3}  {ratio:.2f} × the rows of the reply", flush=True)
    return right >= 0.95 and ratio <= 3


def right_tasks(model: Rows, processor: Any, questions: Iterator[tuple[str, str]], count: int) -> list[Task]:
    """Tasks of prompts that the model answers right."""
    tasks: list[Task] = []
    for number, (prompt, text) in enumerate(questions):
        if len(tasks) == count:
            break
        model.taken()
        if generate(model, processor, prompt, seed=number, options=OPTIONS).text == text:
            tasks.append(Task(prompt, text, model.taken()))
    return tasks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=DEMO, help="asked to follow pairs of letters, unless it is the demo"
    )
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--only", nargs="*", choices=("holes", "several", "edits", "judges"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(arguments.checkpoint, Path(scratch) / "float32", bits=None, dtype="float32")
        model, processor = load(Path(scratch) / "float32")
    make = demo_questions if arguments.checkpoint == DEMO else chain_questions
    counting = Rows(model)
    tasks = right_tasks(counting, processor, make(Draw(0)), arguments.tasks)
    measurements = Measurements(counting, processor, tasks)
    every: dict[str, Callable[[], bool]] = {
        "holes": measurements.holes,
        "several": measurements.several,
        "edits": measurements.edits,
        "judges": measurements.judges,
    }
    held = [measure() for name, measure in every.items() if not arguments.only or name in arguments.only]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
