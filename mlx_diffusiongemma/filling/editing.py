"""Editing in place: a span of a text is written anew, starting from its own tokens."""

from __future__ import annotations

import difflib
import itertools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from ..events import Event, Result
from ..generation.request import canvas_options, make_request
from ..options import GenerationOptions
from .gaps import Anchor, Gap, Piece, Segment, Span, text_tokens
from .infilling import check_milliseconds, reply_ending
from .search import Attempt, GapFiller

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor, Prompt

Spans = tuple[int, int] | Sequence[tuple[int, int]]
BORNE = 4.0  # nats that speak against a token of an anchor, and that it bears at a strength of a half
ROOM = 32  # tokens that a span may gain, beside as many as it has


@dataclass(frozen=True)
class Edited(Result):
    """An edited text: `text` is all of it, with the span as it was where `finish_reason` is cancelled or length.

    diff: unified, from the old text to the new. attempts: the lengths tried and their scores.
    """

    diff: str = ""
    attempts: list[Attempt] = field(default_factory=list)


def edit(
    model: DiffusionGemma,
    processor: Processor,
    text: str,
    span: Spans | None,
    instruction: str | Sequence[dict[str, Any]] | Prompt,
    strength: float = 0.7,
    options: GenerationOptions | None = None,
    *,
    seed: int | None = None,
    milliseconds: float | None = None,
    cache: Cache | None = None,
    cancel: threading.Event | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> Edited:
    """Rewrite the characters `span[0]` to `span[1]` (the one after the last) of `text`; nothing else changes.

    span: one, or a list of several, in order and apart; None is the whole text, in which the model finds the places.
    instruction: what to do. A string is one user turn, with the spans below it; chat messages or a Prompt are sent as
    they are.
    The text is the model's reply, pinned but for the spans. Their lines (their words, where a span has one line) are
    anchors: where the first steps want one too, there it stays as it is, wherever that is by then; what lies between is
    written anew, and is as long as it needs to be. strength: how little it takes for an anchor to go, 0 (the text comes
    back as it is) to 1 (there are none). milliseconds, cache, cancel, on_event: as in `infill`. Raises PromptError and
    BusyError.
    """
    if not isinstance(text, str):
        raise PromptError(f"What to edit is a text, not a {type(text).__name__}.")
    spans = _checked(text, span)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise PromptError(f"strength is {strength!r}; give 0 (keep) to 1 (from noise).")
    check_milliseconds(milliseconds)
    if strength == 0:
        return Edited(text)
    settings = canvas_options(model, options, seed)
    if isinstance(instruction, str):
        instruction = "\n\n".join([instruction, *(text[start:stop] for start, stop in spans)])
    segments: list[Segment] = []
    pieces: list[Piece] = []
    done = 0
    for start, stop in spans:
        own = _rewritten(processor, text[start:stop], strength)
        segments += [text_tokens(processor, text[done:start]), *own]
        pieces += [text[done:start], Span(partial(_written, processor, text[start:stop]), len(own))]
        done = stop
    segments.append(text_tokens(processor, text[done:]))
    request = make_request(model, processor, instruction, options=settings, cache=cache, cancel=cancel)
    filler = GapFiller(
        model,
        processor,
        request,
        [segment for segment in segments if segment],
        reply_ending(processor, is_reply=True),
        [*pieces, text[done:]],
        replies=True,
        keeps_drafts=milliseconds is not None,
        seconds=None if milliseconds is None else milliseconds / 1000,
        on_event=on_event,
    )
    stats = filler.run()
    return Edited(
        text=filler.text,
        tokens=filler.tokens,
        finish_reason=filler.finish_reason,
        stats=stats,
        seed=settings.seed,
        diff=unified_diff(text, filler.text),
        attempts=filler.attempts,
    )


def _checked(text: str, span: Spans | None) -> list[tuple[int, int]]:
    """The spans, in order. Raises PromptError."""
    if span is None:
        span = (0, len(text))
    is_one = isinstance(span, Sequence) and len(span) == 2 and not any(isinstance(each, Sequence) for each in span)
    spans: Sequence[Any] = [span] if is_one or not isinstance(span, Sequence) else span
    for each in spans:
        is_pair = isinstance(each, Sequence) and not isinstance(each, str) and len(each) == 2
        if not is_pair or not all(isinstance(place, int) and not isinstance(place, bool) for place in each):
            raise PromptError(
                f"The span is {each!r}; give two whole numbers, the first character and the one after the last."
            )
        if not 0 <= each[0] < each[1] <= len(text):
            raise PromptError(
                f"The span {each[0]}:{each[1]} does not lie in the text, which has {len(text)} characters; give the "
                "first one and the one after the last."
            )
    if not spans or any(one[1] > other[0] for one, other in itertools.pairwise(spans)):
        raise PromptError("Give one span or more, in order; none may begin before the last one ends.")
    return [(start, stop) for start, stop in spans]


def _rewritten(processor: Processor, text: str, strength: float) -> list[Segment]:
    """Room for what becomes of a span, with its parts as anchors."""
    parts = [text_tokens(processor, part) for part in _parts(text)]
    own = sum(map(len, parts))
    gap = Gap(0, 2 * own + ROOM)
    segments: list[Segment] = [gap]
    for part in parts if strength < 1 else []:
        segments += [Anchor(tuple(part), bears=BORNE * (1 - strength) / strength), gap]
    return segments


def _parts(text: str) -> list[str]:
    """The lines of a text, or the words of a line, each with the space behind it."""
    lines = _lines(text)
    return lines if len(lines) > 1 else re.findall(r"\S+\s*|\s+", text)


def _written(processor: Processor, old: str, tokens: list[int] | None) -> str:
    return old if tokens is None else processor.draft_text(tokens)


def unified_diff(before: str, after: str, name: str = "text") -> str:
    """Compare two texts as `diff -u` prints it; "" where nothing changed. name: the file's."""
    diff = difflib.unified_diff(_lines(before), _lines(after), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in diff)


def _lines(text: str) -> list[str]:
    """Lines with their ends. Only "\\n" ends one: `str.splitlines` knows more, and patches do not."""
    pieces = text.split("\n")
    return [piece + "\n" for piece in pieces[:-1]] + pieces[-1:] * bool(pieces[-1])
