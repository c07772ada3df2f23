"""Many prompts at once: as many replies in flight as memory allows, each the one that its prompt gets alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..checkpoints.accounting import batch_bytes, cache_bytes
from ..checkpoints.memory import usable_bytes
from ..errors import PromptError
from ..events import Commit, Done, Event, Result
from ..model.budgets import BATCH_ROWS
from .replying import collect, reply
from .request import Request, make_request, request_options
from .sampling import seed_of_row

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..options import GenerationOptions, Settings
    from ..processing.processor import Processor
    from .request import PromptLike


def generate_batch(
    model: DiffusionGemma,
    processor: Processor,
    prompts: Sequence[PromptLike],
    *,
    schema: Any = None,
    grammar: str | None = None,
    tool_choice: str | None = None,
    options: GenerationOptions | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
    rows: int = BATCH_ROWS,
) -> Iterator[Result]:
    """Reply to several prompts of any lengths, and give each result as soon as it is there.

    schema, grammar, tool_choice: what every reply has to be like; see `stream`. A prompt's tools are those that
    `processor.prompt` made it with.
    `Result.index` is the place of its prompt, `Result.seed` the seed with which `generate` gives the same text. rows:
    most replies that are denoised together; fewer where memory does not allow as many. A prompt waits until a reply
    ends; pictures that it names by their paths have to stay till then. Setting `cancel`, or closing the iterator, stops
    all within one step. Raises PromptError before anything is computed.
    """
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise PromptError(f"A batch is a list of prompts, not a {type(prompts).__name__}; give a single one in a list.")
    if not prompts:
        raise PromptError("The batch has no prompt; give at least one.")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise PromptError(f"rows is {rows!r}; give a whole number of at least 1.")
    asked = {"schema": schema, "grammar": grammar, "tool_choice": tool_choice}
    in_grammar = any(given is not None for given in asked.values())
    settings = request_options(model, options, max_tokens, seed, in_grammar=in_grammar)
    prompts = list(prompts)  # which the caller may change meanwhile

    def make(index: int) -> Request:
        own = replace(settings, seed=seed_of_row(settings.seed, index))
        return make_request(model, processor, prompts[index], **asked, options=own, cancel=cancel)

    # All are checked before the first is answered; those with images, which are large, are then made again in turn.
    checked = [None if request.prompt.images else request for request in map(make, range(len(prompts)))]
    requests = (make(index) if request is None else request for index, request in enumerate(checked))
    return _results(model, processor, requests, settings, rows)


def _results(
    model: DiffusionGemma, processor: Processor, requests: Iterator[Request], options: Settings, rows: int
) -> Iterator[Result]:
    # Beside the weights, whatever else the process holds now: kept caches, or other requests.
    room = usable_bytes() - mx.get_active_memory()
    item = model.dtype.size
    most = model.config.text.max_position_embeddings

    @cache
    def kept(context: int) -> int:
        return cache_bytes(model.config, context, item)

    def fits(together: Sequence[Request]) -> bool:
        if len(together) > rows:
            return False
        contexts = [min(len(request.prompt.tokens) + options.max_tokens, most) for request in together]
        return batch_bytes(model.config, [kept(context) for context in contexts], max(contexts), item) <= room

    replies: dict[int, list[Event]] = {}
    with closing(reply(model, processor, requests, options, fits)) as events:
        for index, event in events:
            if isinstance(event, Commit | Done):
                replies.setdefault(index, []).append(event)
            if isinstance(event, Done):
                yield replace(collect(replies.pop(index)), index=index)
