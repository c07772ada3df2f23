"""Texts with something missing in the middle: how editors mark it, and jobs that fill it."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import PromptError
from ..events import Result, Stats
from ..filling.infilling import Hole, Infilled, infill
from ..generation.prefix import encode_prompt
from .work.waiting import Item, Job, Turn

if TYPE_CHECKING:
    from ..options import GenerationOptions
    from .service import Service

DEFAULT_TOKENS = 64  # of a middle, where the editor does not say
EMPTY = "<|endoftext|>"  # Continue's spelling of an empty suffix
_MARKED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<\|fim_prefix\|>(?P<prefix>.*)<\|fim_suffix\|>(?P<suffix>.*)<\|fim_middle\|>",
        r"<fim_prefix>(?P<prefix>.*)<fim_suffix>(?P<suffix>.*)<fim_middle>",
        r"<PRE> ?(?P<prefix>.*) <SUF> ?(?P<suffix>.*) <MID>",
        r"\[SUFFIX\](?P<suffix>.*)\[PREFIX\](?P<prefix>.*)",
    )
)


@dataclass(frozen=True)
class Middle:
    """A gap between `prefix` and `suffix`. stops: strings that end what fills it, and are no part of it."""

    prefix: str
    suffix: str
    tokens: int | None = None
    stops: tuple[str, ...] = ()


def find_middle(prompt: str, suffix: str | None) -> tuple[str, str] | None:
    """The texts before and after what is missing, from a prompt with markers or one with a suffix; None where nothing
    says that anything is missing.
    """
    for pattern in _MARKED:
        if match := pattern.search(prompt):
            return match["prefix"], match["suffix"]
    return None if suffix is None else (prompt, "" if suffix == EMPTY else suffix)


async def fill_middle(
    service: Service,
    middle: Middle,
    options: GenerationOptions,
    caller: str,
    *,
    slot: str | None = None,
    seconds: float | None = None,
) -> Job:
    """Queue the filling of a middle, which may run between two canvases of a chat; no tokens at all only read the
    prefix. slot: see `Job`. seconds: that it may take. Raises Refusal and PromptError.
    """
    if not (middle.prefix or middle.suffix):
        raise PromptError("There is no text to complete; send a prompt or a suffix.")
    prompt = await service.prompt(lambda processor: processor.raw_prompt(middle.prefix))
    service.checked(prompt, options)
    model = service.engine.loaded.model
    longest = model.config.canvas_length * 3 // 4
    tokens = min(DEFAULT_TOKENS if middle.tokens is None else middle.tokens, longest)
    options = replace(options, max_tokens=max(tokens, 1), stop=())
    per_step = service.engine.metrics.seconds_per_step
    if seconds is not None and per_step:
        most = options.filled_from(model.options).max_steps or 1
        options = replace(options, max_steps=min(max(int(seconds / per_step), 1), most))
    parts = [part for part in (middle.prefix, Hole(max(tokens, 1)), middle.suffix) if part]

    def fill(turn: Turn) -> Generator[Item, None, None]:
        yield infill(turn.model, turn.processor, parts, options=options, cache=turn.cache, cancel=turn.cancel)

    def read(turn: Turn) -> Generator[Item, None, None]:
        stats = Stats(prompt_tokens=len(prompt.tokens))
        for number, done in enumerate(encode_prompt(turn.model, turn.cache, prompt)):
            stats = replace(stats, cached_tokens=done) if number == 0 else stats
            if turn.cancel.is_set():
                return
        yield Result("", finish_reason="length", stats=stats)

    job = Job(fill if tokens else read, prompt, caller, slot=slot, urgent=True)
    service.engine.submit(job)
    return job


def filled_text(result: Result, stops: tuple[str, ...]) -> str:
    """Give what fills the middle, up to the first stop string."""
    text = result.holes[0] if isinstance(result, Infilled) and result.holes else ""
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]
