"""From a prompt to a reply: encode it, denoise canvas after canvas, commit each, read the text out of it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..errors import CanvasError, PromptError
from ..events import Commit, Done, Draft, Event, FinishReason, Part, Prefill, Result, Stats, ToolCall, join_text
from ..options import GenerationOptions
from ..processing.replies import calls_in, merge, reply_from_parts
from .canvas import Canvas
from .denoising import CanvasRun, Step
from .prefix import encode_prompt
from .stops import StopStrings

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor, Prompt

    PromptLike = str | Sequence[dict[str, Any]] | Sequence[int] | Prompt


def stream(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    *,
    images: Sequence[Any] = (),
    tools: Sequence[Any] = (),
    thinking: bool = False,
    canvas: Canvas | None = None,
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
    Raises PromptError and CanvasError before anything is computed.
    """
    prepared = processor.prompt(prompt, images=images, tools=tools, thinking=thinking)
    settings = request_options(model, options, max_tokens, seed)
    batch = _Batch(model, processor, [prepared], settings, canvas=canvas, cache=cache, cancel=cancel)
    return _events(batch)


def generate(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    *,
    images: Sequence[Any] = (),
    tools: Sequence[Any] = (),
    thinking: bool = False,
    canvas: Canvas | None = None,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> Result:
    """`stream`, to the end: the whole reply."""
    events = stream(
        model,
        processor,
        prompt,
        images=images,
        tools=tools,
        thinking=thinking,
        canvas=canvas,
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
    return Result(reply.text, reply.thinking, calls, tokens, done.finish_reason, done.stats, done.note)


def generate_batch(
    model: DiffusionGemma,
    processor: Processor,
    prompts: Sequence[PromptLike],
    *,
    options: GenerationOptions | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> list[Result]:
    """Replies to several prompts of any lengths, denoised together; rows that are done wait for the others.

    A row's text depends on the seed and on its place in the batch, not on the other rows. Raises PromptError.
    """
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise PromptError(f"A batch is a list of prompts, not a {type(prompts).__name__}; give a single one in a list.")
    if not prompts:
        raise PromptError("The batch has no prompt; give at least one.")
    prepared = [processor.prompt(prompt) for prompt in prompts]
    settings = request_options(model, options, max_tokens, seed)
    replies: list[list[Event]] = [[] for _ in prepared]
    for row, event in _Batch(model, processor, prepared, settings, cancel=cancel).run():
        if isinstance(event, Commit | Done):
            replies[row].append(event)
    return [collect(events) for events in replies]


def request_options(
    model: DiffusionGemma,
    options: GenerationOptions | None,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> GenerationOptions:
    """What a request runs with: nothing left open."""
    settings = (options or GenerationOptions()).filled_from(model.options)
    if max_tokens is not None:
        settings = replace(settings, max_tokens=max_tokens)
    seed = settings.seed if seed is None else seed
    settings = replace(settings, seed=secrets.randbits(63) if seed is None else seed)
    longest = model.config.canvas_length
    if settings.canvas_length > longest:
        raise PromptError(f"canvas_length is {settings.canvas_length}, but this model's canvas has {longest} tokens.")
    return settings


class _Batch:
    """A request of one prompt per row."""

    def __init__(
        self,
        model: DiffusionGemma,
        processor: Processor,
        prompts: list[Prompt],
        options: GenerationOptions,
        *,
        canvas: Canvas | None = None,
        cache: Cache | None = None,
        cancel: threading.Event | None = None,
    ):
        self.model, self.processor, self.prompts, self.options = model, processor, prompts, options
        self.kept = cache
        with self._cache_reserved():
            self._check_cache()
        self.canvas = canvas or Canvas([])
        self.canvas.check(model.config.text.vocab_size)
        if len(self.canvas.tokens) > options.max_tokens:
            raise CanvasError(
                f"The canvas has {len(self.canvas.tokens)} tokens, more than max_tokens={options.max_tokens}; raise it."
            )
        self.cancelled = cancel.is_set if cancel else lambda: False
        if len(prompts) > 1 and any(prompt.images for prompt in prompts):
            raise PromptError("A batch of prompts cannot have images; generate those one by one.")
        self.rows = [_Row(processor, prompt, options) for prompt in prompts]
        self.limit = model.config.text.max_position_embeddings
        longest = max(len(prompt.tokens) for prompt in prompts)
        if not all(prompt.tokens for prompt in prompts):
            raise PromptError("The prompt is empty; give at least one token.")
        if longest + options.canvas_length > self.limit:
            raise PromptError(
                f"The prompt has {longest} tokens; with a canvas of {options.canvas_length}, at most "
                f"{self.limit - options.canvas_length} fit this model's context of {self.limit}."
            )

    def _cache_reserved(self) -> AbstractContextManager[None]:
        return nullcontext() if self.kept is None else self.kept.reserved()

    def _check_cache(self) -> None:
        cache = self.kept
        if cache is not None and (
            cache.config != self.model.config.text or cache.padding is not None or len(cache.labels) != cache.offset
        ):
            raise PromptError("This cache holds a batch, or prompts of another model; give one of model.make_cache().")

    def run(self) -> Iterator[tuple[int, Event]]:
        """Events of all rows, each with its row. Once a `Done` is seen, the cache is free for another request."""
        with self._cache_reserved():
            yield from self._reply()
        for index, row in enumerate(self.rows):
            yield index, Done(row.finish_reason, row.stats, row.note())

    def _reply(self) -> Iterator[tuple[int, Event]]:
        """All events but `Done`."""
        mx.reset_peak_memory()
        started = time.perf_counter()
        cache = self.model.make_cache() if self.kept is None else self.kept
        yield from self._prefill(cache) if self.kept is None else self._prefill_rest(cache)
        prefilled = time.perf_counter()
        number = 0
        while not all(row.finish_reason for row in self.rows):
            yield from self._one_canvas(cache, number)
            number += 1
            if not all(row.finish_reason for row in self.rows):
                self._encode_canvas(cache)
        ended = time.perf_counter()
        for row in self.rows:
            row.stats = replace(
                row.stats,
                prompt_seconds=prefilled - started,
                denoise_seconds=ended - prefilled,
                peak_memory_bytes=mx.get_peak_memory(),
            )

    def _prefill(self, cache: Cache) -> Iterator[tuple[int, Event]]:
        lengths = [len(prompt.tokens) for prompt in self.prompts]
        longest = max(lengths)
        padded = mx.array(
            [prompt.tokens + [0] * (longest - n) for prompt, n in zip(self.prompts, lengths, strict=True)]
        )
        ragged = lengths if min(lengths) < longest else None
        for done in self.model.encode_chunks(padded, cache, self.prompts[0].images, ragged):
            for index, total in enumerate(lengths):
                yield index, Prefill(max(done - (longest - total), 0), total)
            if self.cancelled():
                self._cancel()
                return

    def _prefill_rest(self, cache: Cache) -> Iterator[tuple[int, Event]]:
        """The one prompt, from where the cache ends to agree with it."""
        row, total = self.rows[0], len(self.prompts[0].tokens)
        steps = encode_prompt(self.model, cache, self.prompts[0])
        for number, done in enumerate(steps):
            if number == 0:
                row.stats = replace(row.stats, cached_tokens=done)
            yield 0, Prefill(done, total)
            if self.cancelled():
                self._cancel()
                return

    def _one_canvas(self, cache: Cache, number: int) -> Iterator[tuple[int, Event]]:
        """Denoise a canvas in every unfinished row, again where a reply would be empty, and commit what it gave."""
        rows = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        yield from self._attempt(cache, number, 0, rows)
        retries = self.options.retries if number == 0 and not self.canvas.tokens else 0
        for attempt in range(1, retries + 1):
            empty = [index for index in rows if self.rows[index].is_empty()]
            if not empty:
                break
            for index in empty:
                self.rows[index].retry()
            yield from self._attempt(cache, number, attempt, empty)
        full = cache.offset + 2 * self.options.canvas_length > self.limit
        for index in rows:
            if self.rows[index].finish_reason is None:
                yield index, self.rows[index].commit(number, out_of_context=full)

    def _attempt(self, cache: Cache, number: int, attempt: int, rows: list[int]) -> Iterator[tuple[int, Event]]:
        """Denoise a canvas in the given rows, whose tokens are then those of the last step."""
        options = self.options
        run = CanvasRun(
            self.model,
            cache,
            options,
            [self.canvas.part(number, options.canvas_length)] * len(self.rows),
            self.model.config.text.vocab_size,
            seed=options.seed,
            number=number,
            attempt=attempt,
            settled=[index not in rows for index in range(len(self.rows))],
        )
        working = list(rows)
        steps = run.steps()
        try:
            for step in steps:
                for index in list(working):
                    yield index, self.rows[index].draft(number, step, index)
                    if step.finished[index]:
                        working.remove(index)
                if self.cancelled():
                    self._cancel()
                    return
        finally:
            steps.close()

    def _encode_canvas(self, cache: Cache) -> None:
        self.model.encode(mx.array([row.canvas for row in self.rows]), cache)

    def _cancel(self) -> None:
        for row in self.rows:
            row.finish_reason = row.finish_reason or "cancelled"


def _events(batch: _Batch) -> Generator[Event, None, None]:
    """Those of a batch of one row."""
    with closing(batch.run()) as events:
        for _, event in events:
            yield event


@dataclass
class _Row:
    """One reply in the making."""

    processor: Processor
    prompt: Prompt
    options: GenerationOptions
    canvas: list[int] = field(default_factory=list)  # the argmax canvas of the last step
    tokens: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    steps: int = 0
    wasted_steps: int = 0  # of this canvas's earlier attempts
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.parser = self.processor.reply_parser(self.prompt)
        self.stops = StopStrings(self.options.stop)
        self.stats = Stats(prompt_tokens=len(self.prompt.tokens))

    def draft(self, number: int, step: Step, index: int) -> Draft:
        self.canvas, self.steps = step.tokens[index], step.number
        before_end, _ = _cut_at_end(self.canvas, self.options.end_tokens)
        by_token = self.parser.preview(before_end)
        by_token[0][:0] = self.stops.held_parts
        parts = merge([part for own in by_token for part in own])
        pieces = ["".join(text for _, text in own) for own in by_token]
        return Draft(
            canvas=number,
            step=step.number,
            max_steps=self.options.max_steps,
            tokens=self.canvas,
            accepted=step.accepted[index],
            entropy=step.entropy[index],
            text=join_text(parts),
            parts=parts,
            pieces=pieces + [""] * (len(self.canvas) - len(pieces)),
        )

    def is_empty(self) -> bool:
        """Whether the canvas would end an unfinished reply before its first token."""
        return self.finish_reason is None and self.canvas[0] in self.options.end_tokens

    def retry(self) -> None:
        """The canvas is denoised again."""
        self.wasted_steps += self.steps
        self.stats = replace(self.stats, retries=self.stats.retries + 1)

    def note(self) -> str:
        """What a user should know about a reply that says nothing; empty for any other."""
        if self.finish_reason == "stop" and not self.tokens:
            attempts = self.stats.retries + 1
            times = f", {attempts} times in a row" if attempts > 1 else ""
            return f"The model ended its reply before the first word{times}; ask for more than that, or rephrase."
        reply = reply_from_parts(self.parts)
        if self.finish_reason != "length" or reply.text or reply.tool_calls:
            return ""
        if reply.thinking:
            return f"The thought took all {len(self.tokens)} tokens; raise max_tokens, or ask without thinking."
        return f"The {len(self.tokens)} tokens asked for end before the reply's first word; raise max_tokens."

    def commit(self, number: int, out_of_context: bool) -> Commit:
        """Take the canvas in: up to an end token, a stop string or the last token asked for."""
        tokens, ended = _cut_at_end(self.canvas, self.options.end_tokens)
        room = self.options.max_tokens - len(self.tokens)
        full = len(tokens) > room or (len(tokens) == room and not ended)
        tokens, parts, stopped = self.stops.take(tokens[:room], self.parser.feed)
        if stopped or (ended and not full):
            self.finish_reason = "stop"
        elif full or out_of_context:
            self.finish_reason = "length"
        if self.finish_reason and not stopped:
            last, stopped = self.stops.rest(self.parser.finish())
            parts += last
            if stopped:
                self.finish_reason = "stop"
        parts = merge([part for part in parts if part[1]])
        self.parts += parts
        self.tokens += tokens
        if self.finish_reason == "stop" and any(kind == "tool_call" for kind, _ in self.parts):
            self.finish_reason = "tool"
        steps, self.wasted_steps = self.wasted_steps + self.steps, 0
        self.stats = replace(self.stats, generated_tokens=len(self.tokens), steps=[*self.stats.steps, steps])
        calls = calls_in(parts, self.prompt.first_call + len(self.calls))
        self.calls += calls
        return Commit(number, tokens, parts, steps, calls)


def _cut_at_end(tokens: list[int], end_tokens: tuple[int, ...]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there is one."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[:position], True
    return tokens, False
