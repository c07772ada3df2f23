"""From a prompt to a reply: encode it, denoise canvas after canvas, commit each, read the text out of it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .canvas import Canvas
from .config import GenerationOptions
from .denoising import CanvasRun, Step
from .errors import CanvasError, PromptError
from .events import Commit, Done, Draft, Event, FinishReason, Part, Prefill, Result, Stats, join_text

if TYPE_CHECKING:
    from .model.cache import Cache
    from .model.diffusion_gemma import DiffusionGemma
    from .processor import Processor, Prompt

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
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Event]:
    """Generate a reply and report it as it forms: `Prefill`s, then `Draft`s and a `Commit` per canvas, then `Done`.

    prompt: a string (one user turn), chat messages, token ids or a `Prompt`. images, tools, thinking: see
    `Processor.prompt`. canvas: what to start from instead of noise. options: None is the checkpoint's; `max_tokens`
    and `seed` override it. Setting `cancel` from any thread, or closing the iterator, stops within one step.
    Raises PromptError and CanvasError before anything is computed.
    """
    prepared = processor.prompt(prompt, images=images, tools=tools, thinking=thinking)
    batch = _Batch(model, processor, [prepared], _settings(model, options, max_tokens, seed), canvas, cancel)
    return (event for _, event in batch.run())


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
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> Result:
    """`stream`, to the end: the whole reply."""
    prepared = processor.prompt(prompt, images=images, tools=tools, thinking=thinking)
    batch = _Batch(model, processor, [prepared], _settings(model, options, max_tokens, seed), canvas, cancel)
    return batch.results()[0]


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

    A row's text depends on the seed and on its place in the batch, not on the other rows.
    """
    if not prompts:
        raise PromptError("The batch has no prompt; give at least one.")
    prepared = [processor.prompt(prompt) for prompt in prompts]
    settings = _settings(model, options, max_tokens, seed)
    return _Batch(model, processor, prepared, settings, None, cancel).results()


def _settings(
    model: DiffusionGemma, options: GenerationOptions | None, max_tokens: int | None, seed: int | None
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
        canvas: Canvas | None,
        cancel: threading.Event | None,
    ):
        self.model, self.processor, self.prompts, self.options = model, processor, prompts, options
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

    def results(self) -> list[Result]:
        for _ in self.run():
            pass
        return [row.result() for row in self.rows]

    def run(self) -> Iterator[tuple[int, Event]]:
        """Events of all rows, each with its row."""
        mx.reset_peak_memory()
        started = time.perf_counter()
        cache = self.model.make_cache()
        yield from self._prefill(cache)
        prefilled = time.perf_counter()
        number = 0
        while not all(row.finish_reason for row in self.rows):
            yield from self._one_canvas(cache, number)
            number += 1
            if not all(row.finish_reason for row in self.rows):
                self._encode_canvas(cache)
        ended = time.perf_counter()
        for index, row in enumerate(self.rows):
            row.stats = replace(
                row.stats,
                prompt_seconds=prefilled - started,
                denoise_seconds=ended - prefilled,
                peak_memory_bytes=mx.get_peak_memory(),
            )
            yield index, Done(row.finish_reason, row.stats)

    def _prefill(self, cache: Cache) -> Iterator[tuple[int, Event]]:
        lengths = [len(prompt.tokens) for prompt in self.prompts]
        longest = max(lengths)
        padded = mx.array(
            [prompt.tokens + [0] * (longest - n) for prompt, n in zip(self.prompts, lengths, strict=True)]
        )
        ragged = lengths if min(lengths) < longest else None
        for done, _ in self.model.encode_chunks(padded, cache, self.prompts[0].images, ragged):
            for index, total in enumerate(lengths):
                yield index, Prefill(max(done - (longest - total), 0), total)
            if self.cancelled():
                self._cancel()
                return

    def _one_canvas(self, cache: Cache, number: int) -> Iterator[tuple[int, Event]]:
        """Denoise a canvas in every unfinished row and commit what it gave."""
        options = self.options
        run = CanvasRun(
            self.model,
            cache,
            options,
            [self.canvas.part(number, options.canvas_length)] * len(self.rows),
            self.model.config.text.vocab_size,
            seed=options.seed,
            number=number,
            settled=[row.finish_reason is not None for row in self.rows],
        )
        working = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
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
        full = cache.offset + 2 * options.canvas_length > self.limit
        for index, row in enumerate(self.rows):
            if row.finish_reason is None:
                yield index, row.commit(number, out_of_context=full)

    def _encode_canvas(self, cache: Cache) -> None:
        self.model.encode(mx.array([row.canvas for row in self.rows]), cache)

    def _cancel(self) -> None:
        for row in self.rows:
            row.finish_reason = row.finish_reason or "cancelled"


@dataclass
class _Row:
    """One reply in the making."""

    processor: Processor
    prompt: Prompt
    options: GenerationOptions
    canvas: list[int] = field(default_factory=list)  # the argmax canvas of the last step
    tokens: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    steps: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.parser = self.processor.reply_parser()
        self.stops = _StopStrings(self.options.stop)
        self.stats = Stats(prompt_tokens=len(self.prompt.tokens))

    def draft(self, number: int, step: Step, index: int) -> Draft:
        self.canvas, self.steps = step.tokens[index], step.number
        before_end, _ = _cut_at_end(self.canvas, self.options.end_tokens)
        return Draft(
            canvas=number,
            step=step.number,
            max_steps=self.options.max_steps,
            tokens=self.canvas,
            accepted=step.accepted[index],
            entropy=step.entropy[index],
            text=self.processor.draft_text(before_end),
        )

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
            parts += self.stops.rest(self.parser.finish())
        parts = _merged(parts)
        self.parts += parts
        self.tokens += tokens
        if self.finish_reason == "stop" and any(kind == "tool_call" for kind, _ in self.parts):
            self.finish_reason = "tool"
        self.stats = replace(self.stats, generated_tokens=len(self.tokens), steps=[*self.stats.steps, self.steps])
        return Commit(number, tokens, parts, self.steps)

    def result(self) -> Result:
        reply = self.processor.parse(self.tokens)
        return Result(
            text=join_text(self.parts),
            thinking=reply.thinking,
            tool_calls=reply.tool_calls,
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            stats=self.stats,
        )


class _StopStrings:
    """Looks for stop strings in the visible text, and holds back what may become one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops = stops
        self.held = ""

    def take(self, tokens: list[int], feed: Callable[[list[int]], list[Part]]) -> tuple[list[int], list[Part], bool]:
        """The tokens up to a stop string, their parts without it, and whether one was found."""
        if not self.stops:
            return tokens, feed(tokens), False
        parts: list[Part] = []
        for count, token in enumerate(tokens, start=1):
            for part in feed([token]):
                if self._extend(parts, part):
                    return tokens[:count], parts, True
        return tokens, parts, False

    def rest(self, parts: list[Part]) -> list[Part]:
        """The reply's last parts, after what was held back."""
        held = [("text", self.held)] if self.held else []
        self.held = ""
        return held + parts

    def _extend(self, parts: list[Part], part: Part) -> bool:
        """Append a part; True where a stop string was completed."""
        kind, text = part
        if kind != "text":
            parts += [*self.rest([]), part]
            return False
        text = self.held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.held = ""
            parts.append(("text", text[: min(found)]))
            return True
        keep = max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        parts.append(("text", text[: len(text) - keep]))
        return False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    return max(n for n in range(min(len(text), len(stop) - 1) + 1) if text.endswith(stop[:n]))


def _merged(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind joined, empty ones dropped; tool calls stay apart."""
    merged: list[Part] = []
    for kind, text in parts:
        if merged and merged[-1][0] == kind != "tool_call":
            merged[-1] = (kind, merged[-1][1] + text)
        elif text:
            merged.append((kind, text))
    return merged


def _cut_at_end(tokens: list[int], end_tokens: tuple[int, ...]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there is one."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[:position], True
    return tokens, False
