"""One reply in the making: what was read for it, what it says so far, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ..checkpoints.memory import PeakMemory
from ..events import Commit, Done, Draft, FinishReason, Part, Prefill, Stats, join_text
from ..processing.replies import calls_in, merge, reply_from_parts
from .denoising import Job, Step
from .prefix import encode_prompt
from .sampling import Draws
from .stops import StopStrings

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor
    from .request import Request


class Writer:
    """Writes the reply to one request: reads the prompt, then takes in canvas after canvas.

    The loop calls `read_prompt`, and then for every canvas `next_job`, `draft` with each of its steps, and `commit`,
    until `finish_reason` says why the reply is over; `done` ends it. `close` frees the request's cache at any time.
    number: of the request, among others.
    """

    def __init__(self, model: DiffusionGemma, processor: Processor, request: Request, number: int) -> None:
        self.model, self.request, self.options, self.number = model, request, request.options, number
        self.job: Job | None = None  # the canvas at hand
        self.finish_reason: FinishReason | None = None
        self.tokens: list[int] = []
        self.parts: list[Part] = []
        self._calls = 0  # tool calls so far
        self._number = self._attempt = 0  # of the canvas at hand
        self._canvas: list[int] = []  # its argmax tokens after the last step
        self._committed = False  # and not encoded yet
        self._steps = self._wasted = 0  # what it took, and what earlier attempts at it took
        self._parser = processor.reply_parser(request.prompt)
        self._stops = StopStrings(request.options.stop)
        self._stats = Stats(prompt_tokens=len(request.prompt.tokens))
        self._held = ExitStack()
        kept = request.cache
        self._cache = model.make_cache(snapshot_bytes=0) if kept is None else kept
        if kept is not None:
            self._held.enter_context(kept.reserved())
        self._peak = PeakMemory()
        self._started = self._prefilled = time.perf_counter()

    def read_prompt(self) -> Iterator[Prefill]:
        """Encode what the cache does not hold yet of the prompt, a chunk at a time."""
        total = len(self.request.prompt.tokens)
        for number, done in enumerate(encode_prompt(self.model, self._cache, self.request.prompt)):
            if number == 0:
                self._stats = replace(self._stats, cached_tokens=done)
            if number or self.request.cache is not None:
                yield Prefill(done, total)
            self.notice_cancel()
            if self.finish_reason:
                break
        self._prefilled = time.perf_counter()

    def notice_cancel(self) -> None:
        """End the reply if it is not wanted any more."""
        if self.request.cancelled:
            self.finish_reason = "cancelled"

    def next_job(self) -> Job:
        """Begin the next attempt at a canvas, or the next canvas; the encoder first reads one that was committed."""
        if self._committed:
            self.model.encode(mx.array([self._canvas]), self._cache)
            self._number, self._attempt, self._wasted, self._committed = self._number + 1, 0, 0, False
        start = self.request.canvas.part(self._number, self.options.canvas_length)
        self.job = Job(start, self._cache, Draws(self.options.seed, 0, self._number, self._attempt))
        return self.job

    def draft(self, step: Step) -> Draft:
        """Take in a step of the canvas at hand."""
        self._canvas, self._steps = step.tokens, step.number
        before_end, _ = _cut_at_end(self._canvas, self.options.end_tokens)
        by_token = self._parser.preview(before_end)
        by_token[0][:0] = self._stops.held_parts
        parts = merge([part for own in by_token for part in own])
        pieces = ["".join(text for _, text in own) for own in by_token]
        return Draft(
            canvas=self._number,
            step=step.number,
            max_steps=self.options.max_steps,
            tokens=self._canvas,
            accepted=step.accepted,
            entropy=step.entropy,
            text=join_text(parts),
            parts=parts,
            pieces=pieces + [""] * (len(self._canvas) - len(pieces)),
        )

    def retries(self) -> bool:
        """Whether the canvas at hand is to be denoised once more: it would end the reply before its first token."""
        is_first = self._number == 0 and not self.request.canvas.tokens
        if not is_first or self._attempt == self.options.retries or self._canvas[0] not in self.options.end_tokens:
            return False
        self._attempt += 1
        self._wasted += self._steps
        self._stats = replace(self._stats, retries=self._attempt)
        return True

    def commit(self) -> Commit:
        """Take the canvas in: up to an end token, a stop string or the last token asked for."""
        tokens, ended = _cut_at_end(self._canvas, self.options.end_tokens)
        room = self.options.max_tokens - len(self.tokens)
        full = len(tokens) > room or (len(tokens) == room and not ended)
        length, limit = self.options.canvas_length, self.model.config.text.max_position_embeddings
        out_of_context = self._cache.offset + 2 * length > limit
        tokens, parts, stopped = self._stops.take(tokens[:room], self._parser.feed)
        if stopped or (ended and not full):
            self.finish_reason = "stop"
        elif full or out_of_context:
            self.finish_reason = "length"
        if self.finish_reason and not stopped:
            last, stopped = self._stops.rest(self._parser.finish())
            parts += last
            if stopped:
                self.finish_reason = "stop"
        parts = merge([part for part in parts if part[1]])
        self.parts += parts
        self.tokens += tokens
        if self.finish_reason == "stop" and any(kind == "tool_call" for kind, _ in self.parts):
            self.finish_reason = "tool"
        calls = calls_in(parts, self.request.prompt.first_call + self._calls)
        self._calls += len(calls)
        commit = Commit(self._number, tokens, parts, self._wasted + self._steps, calls)
        steps = [*self._stats.steps, commit.steps]
        self._stats = replace(self._stats, generated_tokens=len(self.tokens), steps=steps)
        self._committed = True
        return commit

    def done(self) -> Done:
        """The last event. The cache is free for another request from here on."""
        ended = time.perf_counter()
        self._stats = replace(
            self._stats,
            prompt_seconds=self._prefilled - self._started,
            denoise_seconds=ended - self._prefilled,
            peak_memory_bytes=self._peak.stop(),
        )
        self.close()
        return Done(self.finish_reason or "cancelled", self._stats, self._note(), self.options.seed)

    def close(self) -> None:
        """Let go of the cache, which is then free for another request."""
        self._peak.stop()
        self._held.close()
        self.job = None
        vars(self).pop("_cache", None)

    def _note(self) -> str:
        """A sentence for the user about a reply that says nothing; empty for any other."""
        if self.finish_reason == "stop" and not self.tokens:
            attempts = self._stats.retries + 1
            times = f", {attempts} times in a row" if attempts > 1 else ""
            return f"The model ended its reply before the first word{times}; ask for more than that, or rephrase."
        reply = reply_from_parts(self.parts)
        if self.finish_reason != "length" or reply.text or reply.tool_calls:
            return ""
        if reply.thinking:
            return f"The thought took all {len(self.tokens)} tokens; raise max_tokens, or ask without thinking."
        return f"The {len(self.tokens)} tokens asked for end before the reply's first word; raise max_tokens."


def _cut_at_end(tokens: list[int], end_tokens: tuple[int, ...]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there is one."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[:position], True
    return tokens, False
