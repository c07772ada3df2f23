"""Infilling: a text with holes, each filled so that it fits what comes before and after."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from ..events import Event, Result
from ..generation.request import canvas_options, make_request
from ..options import GenerationOptions
from .gaps import Gap, Segment, Span, before_stop, most_tokens, text_tokens
from .search import Attempt, GapFiller

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor, Prompt

Instruction = str | Sequence[dict[str, Any]]
MOST_ALTERNATIVES = 8
END_OF_TURN, END_OF_TEXT = "<turn|>", "<eos>"


@dataclass(frozen=True)
class Hole:
    """Room for 1 to `tokens` tokens: a hole finds its own length.

    draft: what to start from instead of noise. stop: texts that end it, and are no part of it.
    """

    tokens: int
    draft: str | None = None
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Alternative:
    """One way to fill the holes: the whole text, what fills each hole, and the log likelihood in nats of that and what
    follows, by which alternatives compare.
    """

    text: str
    holes: list[str]
    log_likelihood: float


@dataclass(frozen=True)
class Infilled(Result):
    """A text whose holes are filled: `text` is all of it; outside the holes it is what was given, byte for byte. Where
    it ended early (`finish_reason` cancelled or length) holes hold the last draft; those that had none are empty, and
    not among `holes`.

    holes: what filled each hole. confidence: 0 to 1 for each, the lower the more undecided its tokens were at the last
    step. alternatives: the ways that were denoised, the likeliest first, where there were several; of a text on more
    than one canvas they differ in what the last one holds. attempts: their lengths and scores. canvases: how many it
    took; more than one where the parts did not fit one together, and then a hole saw only what follows it on its own.
    """

    holes: list[str] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    alternatives: list[Alternative] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    canvases: int = 1


def infill(
    model: DiffusionGemma,
    processor: Processor,
    parts: Sequence[str | Hole],
    instruction: Instruction | Prompt | None = None,
    options: GenerationOptions | None = None,
    *,
    exact: bool = False,
    alternatives: int | None = None,
    milliseconds: float | None = None,
    seed: int | None = None,
    cache: Cache | None = None,
    cancel: threading.Event | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> Infilled:
    """Fill the holes among `parts`.

    Without an instruction the text before the first hole is read as a document and continued. With one (a user turn,
    chat messages or a Prompt) the model reads it as its chat, and the parts are its reply, from the first on. Text
    stays pinned: what follows a hole lies on its canvas as far as it fits, and so does what comes before the hole on
    the same canvas of the reply; everything earlier is read as the prefix. Of text before the holes that is longer than
    the context, the nearest lines are read.

    How long a hole is, is read off the first steps, which leave what follows it open: they say where it fits. There it
    is pinned, for all holes of a canvas together, and the canvas goes on from where it is. A hole that does not end on
    a canvas goes on on the next, as a reply does. Up to three ways that the steps cannot tell apart are denoised to
    the end, and the likeliest is kept. `exact` gives each hole as many tokens as it has room for.

    alternatives: denoise so many ways, 1 to 8, whether they can be told apart or not. milliseconds: the best so far is
    kept after them (`finish_reason` "length"), within a step. cache: from `model.make_cache()`, kept from one call to
    the next: of what precedes the holes, only what is new is encoded. Setting `cancel` from any thread stops within one
    step. `max_tokens` bounds the holes together: those that it leaves no room for stay empty (`finish_reason`
    "length"). on_event: is told how it goes, see `GapFiller`. Raises PromptError and BusyError.
    """
    settings = canvas_options(model, options, seed)
    parts = _checked(parts)
    _check_budget(alternatives, milliseconds)
    segments = [_segment(processor, part, exact) for part in parts]
    prompt = processor.raw_prompt("") if instruction is None else processor.prompt(instruction)
    if isinstance(parts[0], str):
        room = model.config.text.max_position_embeddings - 2 * settings.canvas_length - len(prompt.tokens)
        lead = _nearest_lines(processor, parts[0], room - most_tokens(segments[1:]))
        if instruction is None:
            prompt = processor.prompt([*prompt.tokens, *lead])
        segments[:1] = [] if instruction is None else [lead]
    ending = None if isinstance(parts[-1], Hole) else reply_ending(processor, instruction is not None)
    request = make_request(model, processor, prompt, options=settings, cache=cache, cancel=cancel)
    filler = GapFiller(
        model,
        processor,
        request,
        segments,
        ending,
        [Span(partial(_hole_text, processor, part)) if isinstance(part, Hole) else part for part in parts],
        replies=instruction is not None,
        tries=alternatives,
        seconds=None if milliseconds is None else milliseconds / 1000,
        on_event=on_event,
    )
    stats = filler.run()
    holes = [part for part in parts if isinstance(part, Hole)]
    return Infilled(
        text=filler.text,
        tokens=filler.tokens,
        finish_reason=filler.finish_reason,
        stats=stats,
        seed=settings.seed,
        holes=_texts(processor, holes, filler.filled),
        confidence=[math.exp(-sum(own) / max(len(own), 1)) for own in filler.entropies],
        alternatives=[
            Alternative(filler.text_with(last), _texts(processor, holes, filler.filled_with(last)), -surprise)
            for last, surprise in filler.rivals
        ],
        attempts=filler.attempts,
        canvases=len(filler.steps),
    )


def _hole_text(processor: Processor, hole: Hole, tokens: list[int] | None) -> str:
    return before_stop(processor.draft_text(tokens or []), hole.stop)


def _texts(processor: Processor, holes: Sequence[Hole], filled: Sequence[list[int]]) -> list[str]:
    return [_hole_text(processor, hole, tokens) for hole, tokens in zip(holes, filled, strict=False)]


def _nearest_lines(processor: Processor, text: str, room: int) -> list[int]:
    """The tokens of a text; of one that has more than `room`, those of its last lines. Cut there is in large steps, so
    that a text which grows begins with the same line for long, and its prefix stays encoded.
    """
    tokens = text_tokens(processor, text)
    if len(tokens) <= room or room < 4:
        return tokens
    lines = [text_tokens(processor, line) for line in text.splitlines(keepends=True)]
    surplus = -(-(len(tokens) - room) // (room // 4)) * (room // 4)
    while len(lines) > 1 and surplus > 0:
        surplus -= len(lines.pop(0))
    return [token for line in lines for token in line]


def _check_budget(alternatives: int | None, milliseconds: float | None) -> None:
    """Raises PromptError."""
    if alternatives is not None and (not isinstance(alternatives, int) or not 1 <= alternatives <= MOST_ALTERNATIVES):
        raise PromptError(f"alternatives is {alternatives!r}; give 1 to {MOST_ALTERNATIVES}.")
    check_milliseconds(milliseconds)


def check_milliseconds(milliseconds: float | None) -> None:
    """Raises PromptError where it is no time."""
    is_number = isinstance(milliseconds, int | float) and not isinstance(milliseconds, bool)
    if milliseconds is not None and not (is_number and milliseconds > 0):
        raise PromptError(f"milliseconds is {milliseconds!r}; give a number above 0.")


def reply_ending(processor: Processor, is_reply: bool) -> list[int] | None:
    """The tokens after a finished text on its canvas: the end of the turn where it is a reply, then the end of text.

    None where the tokenizer has neither: what follows the text is then left to the model.
    """
    names = [END_OF_TURN, END_OF_TEXT] if is_reply else [END_OF_TEXT]
    vocabulary = processor.tokenizer.get_vocab()
    ids = [vocabulary.get(name, processor.tokenizer.eos_token_id) for name in names]
    return [token for token in ids if token is not None] or None


def _checked(parts: Sequence[str | Hole]) -> list[str | Hole]:
    is_list = isinstance(parts, Sequence) and not isinstance(parts, str)
    if not is_list or not all(isinstance(part, str | Hole) for part in parts):
        raise PromptError("`parts` is a list of texts and Holes.")
    holes = [part for part in parts if isinstance(part, Hole)]
    if not holes:
        raise PromptError("There is no hole to fill; put a Hole among the parts.")
    for hole in holes:
        if isinstance(hole.tokens, bool) or not isinstance(hole.tokens, int) or hole.tokens < 1:
            raise PromptError(f"A hole takes at least 1 token, not {hole.tokens!r}.")
        if not isinstance(hole.draft, str | None):
            raise PromptError(f"A hole's draft is a text, not {hole.draft!r}.")
        is_list = isinstance(hole.stop, Sequence) and not isinstance(hole.stop, str)
        if not is_list or not all(isinstance(stop, str) and stop for stop in hole.stop):
            raise PromptError(f"What stops a hole is a list of texts, not {hole.stop!r}.")
    return [part for part in parts if part != ""]


def _segment(processor: Processor, part: str | Hole, exact: bool) -> Segment:
    if isinstance(part, str):
        return text_tokens(processor, part)
    draft = text_tokens(processor, part.draft or "")
    return Gap(part.tokens if exact else 1, part.tokens, draft=tuple(draft), stop=tuple(part.stop))
