"""Infilling: a text with holes, each filled so that it fits what comes before and after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from ..events import Event, Result
from ..generation.request import make_request, request_options
from ..options import GenerationOptions
from .gaps import Gap, Segment, Span, text_tokens
from .search import Attempt, GapFiller

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor

Instruction = str | Sequence[dict[str, Any]]
END_OF_TURN, END_OF_TEXT = "<turn|>", "<eos>"


@dataclass(frozen=True)
class Hole:
    """Room for 1 to `tokens` tokens, at most three quarters of a canvas.

    draft: what to start from instead of noise; cut where the length tried is shorter, followed by noise where longer.
    """

    tokens: int
    draft: str | None = None


@dataclass(frozen=True)
class Infilled(Result):
    """A text whose holes are filled: `text` is all of it; outside the holes it is what was given, byte for byte. Holes
    that were not filled (`finish_reason` cancelled or length) are empty in it, and not among `holes`.

    holes: what filled each hole. attempts: the lengths tried and their scores. canvases: how many it took; more than
    one where the parts did not fit one together, and then a hole saw only what follows it on its own canvas.
    """

    holes: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    canvases: int = 1


def infill(
    model: DiffusionGemma,
    processor: Processor,
    parts: Sequence[str | Hole],
    instruction: Instruction | None = None,
    options: GenerationOptions | None = None,
    *,
    exact: bool = False,
    seed: int | None = None,
    cache: Cache | None = None,
    cancel: threading.Event | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> Infilled:
    """Fill the holes among `parts`.

    Without an instruction the text before the first hole is read as a document and continued. With one (a user turn,
    or chat messages) the model reads it as its chat, and the parts are its reply, from the first on. Text stays
    pinned: what follows a hole lies on its canvas as far as it fits, and so does what comes before the hole on the
    same canvas of the reply; everything earlier is read as the prefix.

    A hole's true length is unknown: up to 8 lengths, evenly spaced up to its own, are denoised together, and the one is
    kept that leaves the model the least surprised at hole and text; `exact` tries only the hole's own. Up to 32
    combinations of several holes' lengths are all tried; where there are more, one hole after the other is varied
    while the others keep their best so far. A hole at the end needs no such search: the model ends it itself.

    cache: from `model.make_cache()`, kept from one call to the next: of what precedes the holes, only what is new is
    encoded. Setting `cancel` from any thread stops within one step. `max_tokens` bounds the holes together: those that
    it leaves no room for stay empty (`finish_reason` "length"). on_event: is told how it goes, see `GapFiller`.
    Raises PromptError and BusyError.
    """
    settings = request_options(model, options, seed=seed)
    parts = _checked(parts)
    segments = [_segment(processor, part, exact) for part in parts]
    if instruction is None:
        lead = parts[0] if isinstance(parts[0], str) else ""
        prompt = processor.raw_prompt("")
        prompt = processor.prompt([*prompt.tokens, *text_tokens(processor, lead)])
        segments = segments[1:] if isinstance(parts[0], str) else segments
    else:
        prompt = processor.prompt(instruction)
    ending = None if isinstance(parts[-1], Hole) else reply_ending(processor, instruction is not None)
    request = make_request(model, processor, prompt, options=settings, cache=cache, cancel=cancel)
    hole = Span(lambda tokens: processor.draft_text(tokens or []))
    pieces = [hole if isinstance(part, Hole) else part for part in parts]
    is_reply = instruction is not None
    filler = GapFiller(model, processor, request, segments, ending, pieces, replies=is_reply, on_event=on_event)
    stats = filler.run()
    holes = [processor.draft_text(tokens) for tokens in filler.filled]
    return Infilled(
        text=filler.text,
        tokens=filler.tokens,
        finish_reason=filler.finish_reason,
        stats=stats,
        seed=settings.seed,
        holes=holes,
        attempts=filler.attempts,
        canvases=len(filler.steps),
    )


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
    return [part for part in parts if part != ""]


def _segment(processor: Processor, part: str | Hole, exact: bool) -> Segment:
    if isinstance(part, str):
        return text_tokens(processor, part)
    draft = text_tokens(processor, part.draft or "")
    return Gap(part.tokens if exact else 1, part.tokens, draft=tuple(draft))
