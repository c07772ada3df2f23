"""From requests to replies: encode each prompt, decode and commit piece by piece, until the reply is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..events import Commit, Done, Event, Part, Result, Stats, ToolCall
from ..processing.replies import reply_from_parts
from .decoders.decoder import make_decoder
from .request import Request, make_request
from .writer import Writer

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..options import GenerationOptions, Settings
    from ..processing.processor import Processor
    from .canvas import Canvas
    from .request import PromptLike


def stream(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    *,
    images: Sequence[Any] = (),
    tools: Sequence[Any] = (),
    thinking: bool = False,
    canvas: Canvas | None = None,
    schema: Any = None,
    grammar: str | None = None,
    tool_choice: str | None = None,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> Generator[Event, None, None]:
    """Generate a reply and report it as it forms: `Prefill`s, then `Draft`s and a `Commit` per canvas, then `Done`.

    prompt: a string (one user turn), chat messages, token ids or a `Prompt`. images, tools, thinking: see
    `Processor.prompt`. canvas: what to start from instead of noise. options: None is the checkpoint's; `max_tokens`
    and `seed` override it. Setting `cancel` from any thread, or closing the iterator, stops within one step.
    cache: from `model.make_cache()`, kept from one request to the next: what a prompt has in common with what the
    cache holds is not encoded again, and the reply is the same. One request at a time: another one is refused while
    the events of this one are neither read to `Done` nor closed.

    schema: a JSON Schema that the reply is valid for; `Done.data` is then its value. grammar: a regular expression that
    the whole reply matches, or a Lark grammar with a rule called start. tool_choice: "required" for calls of `tools`
    and nothing else, or the name of the one to call. At most one of these three. A causal pass then chooses every
    token, so that the diffusion decoder's canvases are drafts, as the speculative one's are. A keyword that cannot be
    honoured is refused.
    Raises PromptError, CanvasError and BusyError before anything is computed.
    """
    request = make_request(
        model,
        processor,
        prompt,
        images=images,
        tools=tools,
        thinking=thinking,
        canvas=canvas,
        schema=schema,
        grammar=grammar,
        tool_choice=tool_choice,
        options=options,
        cache=cache,
        max_tokens=max_tokens,
        seed=seed,
        cancel=cancel,
    )
    return (event for _, event in reply(model, processor, iter([request]), request.options))


def generate(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    *,
    images: Sequence[Any] = (),
    tools: Sequence[Any] = (),
    thinking: bool = False,
    canvas: Canvas | None = None,
    schema: Any = None,
    grammar: str | None = None,
    tool_choice: str | None = None,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> Result:
    """Generate a reply and return it whole; the arguments are those of `stream`."""
    events = stream(
        model,
        processor,
        prompt,
        images=images,
        tools=tools,
        thinking=thinking,
        canvas=canvas,
        schema=schema,
        grammar=grammar,
        tool_choice=tool_choice,
        options=options,
        cache=cache,
        max_tokens=max_tokens,
        seed=seed,
        cancel=cancel,
    )
    return collect(events)


def collect(events: Iterable[Event]) -> Result:
    """The whole reply that `events`, from `stream` or a session, report."""
    tokens: list[int] = []
    parts: list[Part] = []
    calls: list[ToolCall] = []
    done = Done("cancelled", Stats())
    for event in events:
        match event:
            case Commit():
                tokens += event.tokens
                parts += event.parts
                calls += event.tool_calls
            case Done():
                done = event
    reply = reply_from_parts(parts)
    return Result(
        text=reply.text,
        thinking=reply.thinking,
        tool_calls=calls,
        tokens=tokens,
        finish_reason=done.finish_reason,
        stats=done.stats,
        note=done.note,
        seed=done.seed,
        data=done.data,
        stop_string=done.stop_string,
    )


def reply(
    model: DiffusionGemma,
    processor: Processor,
    requests: Iterator[Request],
    options: Settings,
    fits: Callable[[Sequence[Request]], bool] = lambda requests: True,
) -> Generator[tuple[int, Event], None, None]:
    """Run the whole loop: give the events of the replies to `requests`, each with the number of its request.

    options: how all of them are decoded, under grammars or not; a request's own say the rest. fits: whether so many
    requests can be in flight at once; the next one is taken when there is room for it. Replies are written together, a
    row each, and a reply makes room as soon as it is over.
    """
    number, upcoming = 0, next(requests, None)
    decoder = make_decoder(model, options, in_grammar=upcoming is not None and upcoming.grammar is not None)
    writing: list[Writer] = []
    try:
        while upcoming or writing:
            while upcoming and (not writing or fits([*(writer.request for writer in writing), upcoming])):
                writing.append(writer := Writer(model, processor, upcoming, number))
                for event in decoder.add(writer):
                    yield number, event
                number, upcoming = number + 1, next(requests, None)
            for writer in writing:
                writer.notice_cancel()
            decoder.drop([writer for writer in writing if writer.finish_reason])
            for writer, event in decoder.step():
                yield writer.number, event
            ended = [(writer.number, writer.done()) for writer in writing if writer.finish_reason]
            writing = [writer for writer in writing if not writer.finish_reason]
            yield from ended
    finally:
        decoder.drop(writing)
        for writer in writing:
            writer.close()
