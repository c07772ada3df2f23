"""Editing in place: a span of a text is written anew, starting from its own tokens."""

from __future__ import annotations

import difflib
import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from ..events import Event, Result
from ..generation.request import make_request, request_options
from ..options import GenerationOptions
from .gaps import Filling, Gap, Segment, longest_gap, text_tokens
from .infilling import reply_ending
from .search import Attempt, GapFiller

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor


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
    span: tuple[int, int],
    instruction: str | Sequence[dict[str, Any]],
    strength: float = 0.7,
    options: GenerationOptions | None = None,
    *,
    seed: int | None = None,
    cache: Cache | None = None,
    cancel: threading.Event | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> Edited:
    """Rewrite the characters `span[0]` to `span[1]` (the one after the last) of `text`; nothing else changes.

    instruction: what to do. A string is one user turn, with the span below it; chat messages are sent as they are.
    The text is the model's reply, pinned but for the span, which starts from its own tokens. strength: the share of
    them that noise replaces, 0 (the text comes back as it is) to 1 (from noise). Besides the span's own length, some
    shorter and longer ones are tried, as in `infill`. cache, cancel, on_event: as in `infill`. Raises PromptError and
    BusyError.
    """
    if not isinstance(text, str):
        raise PromptError(f"What to edit is a text, not a {type(text).__name__}.")
    is_pair = isinstance(span, Sequence) and len(span) == 2
    if not is_pair or not all(isinstance(place, int) and not isinstance(place, bool) for place in span):
        raise PromptError(
            f"The span is {span!r}; give two whole numbers, the first character and the one after the last."
        )
    start, stop = span
    if not 0 <= start < stop <= len(text):
        raise PromptError(
            f"The span {start}:{stop} does not lie in the text, which has {len(text)} characters; give a first one and "
            "the one after the last."
        )
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise PromptError(f"strength is {strength!r}; give 0 (keep) to 1 (from noise).")
    if strength == 0:
        return Edited(text)
    settings = request_options(model, options, seed=seed)
    own = text_tokens(processor, text[start:stop])
    longest = longest_gap(settings.canvas_length)
    if len(own) > longest:
        raise PromptError(f"The span has {len(own)} tokens; at most {longest} can be edited at once.")
    if isinstance(instruction, str):
        instruction = f"{instruction}\n\n{text[start:stop]}"
    gap = Gap(tuple(_started(own, length, strength, settings.seed) for length in _lengths(len(own), longest)))
    segments: list[Segment] = [text_tokens(processor, text[:start]), gap, text_tokens(processor, text[stop:])]
    request = make_request(model, processor, instruction, options=settings, cache=cache, cancel=cancel)

    def written(tokens: list[int] | None) -> str:
        return text[start:stop] if tokens is None else processor.draft_text(tokens)

    filler = GapFiller(
        model,
        processor,
        request,
        [segment for segment in segments if segment],
        reply_ending(processor, is_reply=True),
        [text[:start], written, text[stop:]],
        replies=True,
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


def unified_diff(before: str, after: str, name: str = "text") -> str:
    """Compare two texts as `diff -u` prints it; "" where nothing changed. name: the file's."""
    diff = difflib.unified_diff(_lines(before), _lines(after), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in diff)


def _lines(text: str) -> list[str]:
    """Lines with their ends. Only "\\n" ends one: `str.splitlines` knows more, and patches do not."""
    pieces = text.split("\n")
    return [piece + "\n" for piece in pieces[:-1]] + pieces[-1:] * bool(pieces[-1])


def _lengths(own: int, longest: int) -> list[int]:
    """Lengths of the new span to try: its own, and up to a quarter (at least three tokens) more or less."""
    reach = max(math.ceil(own / 4), 3)
    steps = sorted({round(reach * part / 3) for part in range(-3, 4)})
    return sorted({min(max(own + step, 1), longest) for step in steps})


def _started(own: list[int], length: int, strength: float, seed: int) -> Filling:
    """The span's tokens, each gone (to become noise) with the probability `strength`; the same ones at any length."""
    draw = random.Random(seed)
    kept = [None if draw.random() < strength else token for token in own]
    return Filling((*kept[:length], *[None] * (length - len(own))))
