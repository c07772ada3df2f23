"""Forms: a template whose fields the model fills, valid by construction."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ..errors import PromptError
from ..events import Event, Result
from ..generation.request import canvas_options, make_request
from ..options import GenerationOptions
from .gaps import Gap, Segment, Span, most_tokens, text_tokens
from .infilling import Instruction, reply_ending
from .scoring import EMPTY_THOUGHT, log_probabilities, noise_canvases, probe
from .search import Attempt, GapFiller

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor

PLACE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Choice:
    """One of `options`."""

    options: Sequence[str]


@dataclass(frozen=True)
class Digits:
    """A whole number of `least` to `most` digits without leading zeros, as JSON wants it."""

    most: int
    least: int = 1


@dataclass(frozen=True)
class Text:
    """Up to `tokens` tokens of text, which ends before the first control character or one of `without`: by default
    it can stand between a JSON string's quotation marks.
    """

    tokens: int
    without: str = '"\\'


Field = Choice | Digits | Text


@dataclass(frozen=True)
class Form(Result):
    """A filled template in `text`. values: what each field holds. confidence: 0 to 1 for each field: how probable the
    model finds its tokens, each with all others in place and itself left out (the geometric mean). attempts: what was
    tried, and the scores. Where `finish_reason` is cancelled or
    length there is no text and there are no values: all come at once.
    """

    values: dict[str, str] = field(default_factory=dict)
    confidence: dict[str, float] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)


def fill(
    model: DiffusionGemma,
    processor: Processor,
    template: str,
    fields: Mapping[str, Field],
    options: GenerationOptions | None = None,
    *,
    instruction: Instruction | None = None,
    seed: int | None = None,
    cache: Cache | None = None,
    cancel: threading.Event | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> Form:
    """Fill every `{{name}}` of `template` with what `fields[name]` allows, all on one canvas; the rest is pinned.

    instruction: what the form is about, as in `infill`, whose reply it is; without one the template is a document of
    its own. Every option of a Choice, and several lengths of the other fields, are tried as `infill` tries lengths.
    cache, cancel, on_event: as in `infill`. Raises PromptError and BusyError.
    """
    if not isinstance(template, str) or not isinstance(fields, Mapping):
        raise PromptError("A form takes a template, which is a text, and its fields by name: {name: field}.")
    settings = canvas_options(model, options, seed)
    pieces = PLACE.split(template)  # text, name, text, …, text
    names = pieces[1::2]
    _check(names, fields)
    segments: list[Segment] = [
        _gap(processor, piece, fields[piece]) if place % 2 else text_tokens(processor, piece)
        for place, piece in enumerate(pieces)
    ]
    ending = reply_ending(processor, instruction is not None)
    thought = processor.tokenizer.encode(EMPTY_THOUGHT, add_special_tokens=False)  # which may come first
    needed = len(thought) + most_tokens([*segments, Gap(0, len(ending or ()))])
    if needed > settings.canvas_length:
        raise PromptError(
            f"The template takes up to {needed} tokens; a canvas has {settings.canvas_length}, so fill it in parts."
        )
    prompt = processor.raw_prompt("") if instruction is None else processor.prompt(instruction)
    request = make_request(model, processor, prompt, options=settings, cache=cache, cancel=cancel)
    filler = GapFiller(
        model,
        processor,
        request,
        segments,
        ending,
        [Span(partial(_read, processor, fields[piece])) if place % 2 else piece for place, piece in enumerate(pieces)],
        replies=instruction is not None,
        at_once=True,
        on_event=on_event,
    )
    confidence: dict[str, float] = {}
    stats = filler.run(lambda: confidence.update(_confidence(filler, names)))
    if filler.finish_reason != "stop":
        return Form(
            filler.text, finish_reason=filler.finish_reason, stats=stats, seed=settings.seed, attempts=filler.attempts
        )
    values = {name: _read(processor, fields[name], tokens) for name, tokens in zip(names, filler.filled, strict=True)}
    return Form(
        text=filler.text,
        tokens=filler.tokens,
        stats=stats,
        seed=settings.seed,
        values=values,
        confidence=confidence,
        attempts=filler.attempts,
    )


def _check(names: list[str], fields: Mapping[str, Field]) -> None:
    if not names:
        raise PromptError("The template has no field; write {{name}} where one belongs.")
    for name in names:
        if name not in fields:
            raise PromptError(f"The template's field {name!r} is not among the fields given; say what it may hold.")
        if names.count(name) > 1:
            raise PromptError(f"The template has the field {name!r} twice; give each place its own name.")
    for name, own in fields.items():
        if name not in names:
            raise PromptError(f"The template has no field {name!r}; write {{{{{name}}}}} where it belongs.")
        match own:
            case Choice(options) if isinstance(options, str) or not isinstance(options, Sequence) or not options:
                raise PromptError(f"The field {name!r} needs a list of different options.")
            case Choice(options) if not all(isinstance(option, str) and option for option in options):
                raise PromptError(f"The options of the field {name!r} are texts, none of them empty.")
            case Choice(options) if len(set(options)) < len(options):
                raise PromptError(f"The field {name!r} needs a list of different options.")
            case Digits(most, least) if not (isinstance(most, int) and isinstance(least, int)):
                raise PromptError(f"The field {name!r} asks for {least!r} to {most!r} digits; give whole numbers.")
            case Digits(most, least) if not 1 <= least <= most:
                raise PromptError(f"The field {name!r} asks for {least} to {most} digits; give at least one.")
            case Text(tokens) if not isinstance(tokens, int) or tokens < 1:
                raise PromptError(
                    f"The field {name!r} has room for {tokens!r} tokens; give a whole number, at least one."
                )
            case Text(_, without) if not isinstance(without, str):
                raise PromptError(f"The field {name!r} goes without {without!r}; give the characters as a text.")
            case Choice() | Digits() | Text():
                pass
            case _:
                raise PromptError(f"The field {name!r} is {own!r}; give a Choice, Digits or Text.")


def _gap(processor: Processor, name: str, own: Field) -> Gap:
    match own:
        case Choice(options):
            return Gap.of([text_tokens(processor, option) for option in options])
        case Text(tokens):
            return Gap(1, tokens)
        case Digits(most, least):
            spelled = [text_tokens(processor, digit) for digit in "0123456789"]
            if any(len(tokens) != 1 for tokens in spelled):
                raise PromptError(f"The field {name!r}: this checkpoint's tokenizer has no token for each digit.")
            digits = tuple(tokens[0] for tokens in spelled)
            return Gap(least, most, digits=digits)


def _read(processor: Processor, own: Field, tokens: list[int] | None) -> str:
    """Read what a field holds."""
    if tokens is None:
        return ""
    text = processor.draft_text(tokens)
    if not isinstance(own, Text):
        return text
    ends = (place for place, character in enumerate(text) if character < " " or character in own.without)
    return text[: next(ends, len(text))]


def _confidence(filler: GapFiller, names: list[str]) -> dict[str, float]:
    """Tell how sure the model is of each field, see `Form`. Raises Cancelled."""
    assert filler.best is not None  # nothing is filled without a canvas
    canvas, seed = filler.best.tokens, filler.options.seed
    [noise] = noise_canvases(seed, 1, len(canvas), filler.vocabulary)
    probes = [
        [probe(canvas, place, {place}, noise) for place in range(start, stop)]
        for start, stop in filler.best.layout.gaps
    ]
    asked = [each for own in probes for each in own]
    values = iter(log_probabilities(filler.model, filler.cache, asked, filler.is_over))
    means = [sum(next(values) for _ in own) / len(own) for own in probes]
    return {name: math.exp(mean) for name, mean in zip(names, means, strict=True)}
