"""Holes that find their own length, and edits: how many come out exactly right, and what they cost.

    python tests/benchmarks/infill.py [--checkpoint DIR] [--tasks 200] [--seeds 1] [--draw 0] [--failures]
        [--only holes several edits judges beside]

Without a checkpoint the trained demo is measured, else one of its size whose prompts are `follow ab bc … from a 20`.
Tasks are made of replies that the checkpoint gets right in chat, with each of so many seeds: their middles of 1 to 40
tokens become holes of 48, on one canvas and across canvases; or something in them is changed, doubled (so that it must
be deleted), left out (so that it must be inserted), renamed everywhere, swapped with its neighbour or moved elsewhere,
and the edit must bring it back. Canvas rows are compared with those of the plain replies. `beside` fills the same holes
in two other ways: by asking for the middle alone in chat, and by the causal decoder, left to right. The exit status is
1 where a bar does not hold: 95 % right, at most 3 times the rows, and a first draft after one step; nothing outside a
span ever moves.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


class Outcome(NamedTuple):
    """Of one task: whether it came out right, the canvas rows that it took, and those of the plain reply."""

    right: bool
    rows: int
    plain: int


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
    """What is measured: each takes tasks and prints what it finds; whether its bars hold comes back.

    failures: print those too that did not come out right.
    """

    def __init__(self, model: Rows, processor: Any, tasks: list[Task], failures: bool) -> None:
        self.model, self.processor, self.tasks, self.failures = model, processor, tasks, failures

    def outcome(self, task: Task, given: object, text: str) -> Outcome:
        """Of a task of which `given` became `text`, with the rows since the last time `model.taken` was asked."""
        if self.failures and text != task.text:
            print(f"  {task.prompt!r}, {given!r}: {text!r}")
        return Outcome(text == task.text, self.model.taken(), task.rows)

    def holes(self) -> bool:
        """One hole of unknown length; on one canvas, and across canvases."""
        length = self.model.options.canvas_length
        held, first_drafts = True, []
        outcomes: dict[str, list[Outcome]] = {}
        for number, task in enumerate(self.tasks):
            start, stop = hole(task.text, number)
            parts = [task.text[:start], Hole(ROOM), task.text[stop:]]
            drafts: list[int] = []

            def note(event: object, drafts: list[int] = drafts) -> None:
                if isinstance(event, Draft) and not drafts:
                    drafts.append(event.step)

            self.model.taken()
            found = infill(self.model, self.processor, parts, task.prompt, seed=number, on_event=note)
            assert found.text.startswith(parts[0]) and found.text.endswith(parts[2])
            first_drafts += drafts
            kind = "one canvas" if start // length == stop // length else "across canvases"
            outcomes.setdefault(kind, []).append(self.outcome(task, parts, found.text))
        for kind, own in outcomes.items():
            held = shown(f"one hole, {kind}", own) and held
        print(f"first drafts come after step {max(first_drafts)} at the latest")
        return held and max(first_drafts) == 1

    def several(self) -> bool:
        """Four holes in one text."""
        outcomes = []
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
            parts.append(task.text[done:])
            self.model.taken()
            found = infill(self.model, self.processor, parts, task.prompt, seed=number)
            outcomes.append(self.outcome(task, parts, found.text))
        return shown("four holes", outcomes)

    def edits(self) -> bool:
        """An old text becomes the right one, within a span and without one."""
        outcomes: dict[str, list[Outcome]] = {}
        by_damage: dict[str, list[Outcome]] = {}
        for number, task in enumerate(self.tasks):
            draw, damage = Draw(number), DAMAGES[number % len(DAMAGES)]
            old, start, stop = damage(task.text, draw)
            is_whole = number // len(DAMAGES) % 2
            first = max(0, min(start, len(old) - 1) - draw.randrange(4))
            span = None if is_whole else (first, min(len(old), stop + draw.randint(1, 4)))
            messages = [{"role": "user", "content": task.prompt}]
            self.model.taken()
            found = edit(self.model, self.processor, old, span, messages, seed=number)
            if span:
                assert found.text.startswith(old[: span[0]]) and found.text.endswith(old[span[1] :])
            outcome = self.outcome(task, (old, span), found.text)
            outcomes.setdefault(f"edits, {'whole text' if is_whole else 'a span'}", []).append(outcome)
            by_damage.setdefault(f"  {damage.__name__.replace('_', ' ')}", []).append(outcome)
        held = [shown(kind, own) for kind, own in outcomes.items()]
        for kind, own in by_damage.items():
            shown(kind, own)
        return all(held)

    def judges(self) -> bool:
        """Of the right filling and a wrong one, which do the two judges prefer, and how often do they agree?"""
        end, length = reply_ending(self.processor, is_reply=True), self.model.options.canvas_length
        verdicts = []
        for number, task in enumerate(self.tasks):
            text = text_tokens(self.processor, task.text)
            start, stop = hole(text, number)
            right = text[start:stop]
            wrong = [*right, *right] if number % 2 else [token for token in right if token != right[0]]
            rows = []
            for filling in (right, wrong):
                whole = [*text[:start], *filling, *text[stop:], end[0]]
                canvas = [*whole, *[end[-1]] * length][:length]
                rows.append(FilledCanvas(canvas, whole[:length], [(start, start + len(filling))], [False]))
            if max(stop, start + len(wrong)) >= length - 4:
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

    def beside(self) -> bool:
        """The same holes, filled in other ways."""
        ways: dict[str, Callable[[Task, int, int, int], tuple[str, int]]] = {
            "a hole": self._as_hole,
            "asked for in chat": self._asked_for,
            "left to right": self._left_to_right,
        }
        for name, fill in ways.items():
            rights, rows, passes = 0, 0, 0
            for number, task in enumerate(self.tasks):
                start, stop = hole(task.text, number)
                self.model.taken()
                middle, causal = fill(task, start, stop, number)
                rights, rows, passes = (
                    rights + (middle == task.text[start:stop]),
                    rows + self.model.taken(),
                    passes + causal,
                )
            count = len(self.tasks)
            cost = f"{rows / count:4.1f} canvas rows, {passes / count:4.1f} causal passes"
            print(f"{name:28} {rights / count:6.1%} of {count:3}  {cost}", flush=True)
        return True

    def _as_hole(self, task: Task, start: int, stop: int, seed: int) -> tuple[str, int]:
        """What fills the hole, and the causal passes that this took."""
        parts = [task.text[:start], Hole(ROOM), task.text[stop:]]
        found = infill(self.model, self.processor, parts, task.prompt, seed=seed)
        return found.holes[0], 0

    def _asked_for(self, task: Task, start: int, stop: int, seed: int) -> tuple[str, int]:
        """The prompt, its reply with a gap, and the request for what is missing, as one asks a chat model."""
        gapped = f"{task.text[:start]}<FILL>{task.text[stop:]}"
        asked = f"{task.prompt}\n\n{gapped}\n\nReply with the text that belongs in place of <FILL>, and nothing else."
        options = GenerationOptions(max_tokens=ROOM)
        return generate(self.model, self.processor, asked, seed=seed, options=options).text, 0

    def _left_to_right(self, task: Task, start: int, stop: int, seed: int) -> tuple[str, int]:
        """The likeliest tokens after the text before the hole, cut where most of what follows it comes up."""
        prompt, after = self.processor.prompt(task.prompt).tokens, task.text[stop:]
        before = text_tokens(self.processor, task.text[:start])
        options = GenerationOptions(max_tokens=ROOM + len(after) + 1, decoder="autoregressive", temperature=0)
        written = generate(self.model, self.processor, [*prompt, *before], seed=seed, options=options)
        text = written.text + ("\0" if written.finish_reason == "stop" else "")
        cuts = range(1, min(ROOM, len(text)) + 1)
        best = max(cuts, key=lambda cut: common(text[cut:], after + "\0"), default=0)
        return text[:best], written.stats.passes


def hole(text: Sequence[Any], number: int) -> tuple[int, int]:
    """Where the hole of a task begins and ends: a middle of 1 to MOST tokens, with at least one behind it."""
    draw = Draw(number)
    middle = draw.randint(1, min(MOST, len(text) - 2))
    start = draw.randint(0, len(text) - middle - 1)
    return start, start + middle


def common(one: str, other: str) -> int:
    """How many characters two texts begin with that are the same."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


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


def moved(text: str, draw: Draw) -> tuple[str, int, int]:
    """A word out of its place and between others, at least two further on."""
    spans = words(text)
    first, last = sorted(draw.sample(range(len(spans) - 1), 2))
    (start, middle), (_, stop) = spans[first], spans[last + 1]
    return text[:start] + text[middle:stop] + text[start:middle] + text[stop:], start, stop


DAMAGES = (changed, doubled, left_out, renamed, swapped, moved)


def words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text are, each with the space behind it; the letters where there are few words."""
    found = [match.span() for match in re.finditer(r"\S+\s*", text)]
    return found if len(found) > 3 else [(place, place + 1) for place in range(len(text))]


def shown(name: str, outcomes: Sequence[Outcome]) -> bool:
    """Print the share that is right and the cost; whether both bars hold."""
    right = sum(own.right for own in outcomes) / len(outcomes)
    ratio = sum(own.rows for own in outcomes) / sum(own.plain for own in outcomes)
    print(f"{name:28} {right:6.1%} of {len(outcomes):3}  {ratio:.2f} × the rows of the reply", flush=True)
    return right >= 0.95 and ratio <= 3


def sure_tasks(model: Rows, processor: Any, questions: Iterator[tuple[str, str]], count: int, seeds: int) -> list[Task]:
    """Tasks of texts that the model can write: it answers the prompt right with each of so many seeds.

    What is right by luck once tells of the luck: how often the same reply comes out right again is printed.
    """
    tasks: list[Task] = []
    asked, agreed = 0, 0
    for number, (prompt, text) in enumerate(questions):
        if len(tasks) == count:
            break
        model.taken()
        if generate(model, processor, prompt, seed=number, options=OPTIONS).text != text:
            continue
        rows = model.taken()
        others = [number + 10**6 * time for time in range(1, seeds)]
        again = [generate(model, processor, prompt, seed=seed, options=OPTIONS).text == text for seed in others]
        asked, agreed = asked + len(again), agreed + sum(again)
        if all(again):
            tasks.append(Task(prompt, text, rows))
    if asked:
        print(f"replies that were right once {agreed / asked:6.1%} right again, of {asked}", flush=True)
    return tasks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=DEMO, help="asked to follow pairs of letters, unless it is the demo"
    )
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1, help="with which a task's reply must come out right [1]")
    parser.add_argument("--draw", type=int, default=0, help="other tasks, by another seed [0]")
    parser.add_argument("--failures", action="store_true", help="print what did not come out right")
    parser.add_argument("--only", nargs="*", choices=("holes", "several", "edits", "judges", "beside"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(arguments.checkpoint, Path(scratch) / "float32", bits=None, dtype="float32")
        model, processor = load(Path(scratch) / "float32")
    make = demo_questions if arguments.checkpoint == DEMO else chain_questions
    counting = Rows(model)
    tasks = sure_tasks(counting, processor, make(Draw(arguments.draw)), arguments.tasks, arguments.seeds)
    measurements = Measurements(counting, processor, tasks, arguments.failures)
    every: dict[str, Callable[[], bool]] = {
        "holes": measurements.holes,
        "several": measurements.several,
        "edits": measurements.edits,
        "judges": measurements.judges,
        "beside": measurements.beside,
    }
    held = [measure() for name, measure in every.items() if not arguments.only or name in arguments.only]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
