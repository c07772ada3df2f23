"""One reply in the making: what was read for it, what it says so far, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ..checkpoints.memory import PeakMemory
from ..events import Commit, Done, FinishReason, Part, Prefill, Stats
from ..processing.replies import calls_in, merge, reply_from_parts
from .prefix import encode_prompt, split_off_end
from .stops import StopStrings

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor
    from .request import Request


class Writer:
    """Writes the reply to one request, whichever decoder finds its tokens.

    A decoder calls `read_prompt`, then `take` with all that it is certain of, until `finish_reason` says why the reply
    is over; `done` ends it. `close` frees the request's cache at any time. number: of the request, among others.
    """

    def __init__(self, model: DiffusionGemma, processor: Processor, request: Request, number: int) -> None:
        self.model, self.request, self.options, self.number = model, request, request.options, number
        self.finish_reason: FinishReason | None = None
        self.tokens: list[int] = []
        self.parts: list[Part] = []
        self.parser = processor.reply_parser(request.prompt)
        self.stops = StopStrings(request.options.stop)
        self.commits = 0  # so far
        self._calls = 0  # tool calls so far
        self._stats = Stats(prompt_tokens=len(request.prompt.tokens))
        self._held = ExitStack()
        kept = request.cache
        self.cache = model.make_cache(snapshot_bytes=0) if kept is None else kept
        if kept is not None:
            self._held.enter_context(kept.reserved())
        self._peak = PeakMemory()
        self._started = self._prefilled = time.perf_counter()

    @property
    def room(self) -> int:
        """Tokens that the reply may still have."""
        return self.options.max_tokens - len(self.tokens)

    @property
    def context(self) -> int:
        """Tokens that the model's context has room for behind those in the cache."""
        return self.model.config.text.max_position_embeddings - self.cache.offset

    def last_tokens(self, count: int) -> list[int]:
        """The last `count` tokens of the prompt and what is written of the reply, or as many as there are."""
        return [*self.request.prompt.tokens[-count:], *self.tokens[-count:]][-count:]

    def read_prompt(self, end: int | None = None) -> Iterator[Prefill]:
        """Encode what the cache does not hold yet of the prompt's first `end` tokens, a chunk at a time. None: all.

        With fewer than all, the decoder reads the last ones itself, which counts as done.
        """
        total = len(self.request.prompt.tokens)
        for number, done in enumerate(encode_prompt(self.model, self.cache, self.request.prompt, end)):
            if number == 0:
                self._stats = replace(self._stats, cached_tokens=done)
            if number or self.request.cache is not None:
                yield Prefill(total if done == end else done, total)
            self.notice_cancel()
            if self.finish_reason:
                break
        self._prefilled = time.perf_counter()

    def read_whole_prompt(self) -> Generator[Prefill, None, mx.array | None]:
        """Encode the prompt, its end always anew: the hidden state [1, 1, H] of its last token, or None where the reply
        is over before.
        """
        prompt = self.request.prompt
        end, images = split_off_end(self.model, prompt)
        yield from self.read_prompt(end)
        if self.finish_reason:
            return None
        return self.model.encode(mx.array([prompt.tokens[end:]]), self.cache, images)[:, -1:]

    def notice_cancel(self) -> None:
        """End the reply if it is not wanted any more."""
        if self.request.cancelled:
            self.finish_reason = "cancelled"

    def count(self, steps: int | None = None, passes: int = 0, retries: int = 0) -> None:
        """Add to what the reply cost. steps: denoising steps of one more canvas."""
        stats = self._stats
        canvases = stats.steps if steps is None else [*stats.steps, steps]
        self._stats = replace(stats, steps=canvases, passes=stats.passes + passes, retries=stats.retries + retries)

    def take(self, tokens: list[int], *, steps: int = 0, last: bool = False) -> Commit:
        """Take in the next tokens: up to an end token, a stop string or the last token asked for.

        steps: the denoising steps behind them. last: there is no room in the model's context for more.
        """
        tokens, ended = cut_at_end(tokens, self.options.end_tokens)
        room = self.room
        full = len(tokens) > room or (len(tokens) == room and not ended)
        tokens, parts, stopped = self.stops.take(tokens[:room], self.parser.feed)
        if stopped or (ended and not full):
            self.finish_reason = "stop"
        elif full or last:
            self.finish_reason = "length"
        if self.finish_reason and not stopped:
            rest, stopped = self.stops.rest(self.parser.finish())
            parts += rest
            if stopped:
                self.finish_reason = "stop"
        parts = merge([part for part in parts if part[1]])
        self.parts += parts
        self.tokens += tokens
        if self.finish_reason == "stop" and any(kind == "tool_call" for kind, _ in self.parts):
            self.finish_reason = "tool"
        calls = calls_in(parts, self.request.prompt.first_call + self._calls)
        self._calls += len(calls)
        commit = Commit(self.commits, tokens, parts, steps, calls)
        self.commits += 1
        return commit

    def done(self) -> Done:
        """The last event. The cache is free for another request from here on."""
        ended = time.perf_counter()
        self._stats = replace(
            self._stats,
            generated_tokens=len(self.tokens),
            prompt_seconds=self._prefilled - self._started,
            denoise_seconds=ended - self._prefilled,
            peak_memory_bytes=self._peak.stop(),
        )
        self.close()
        reason, grammar = self.finish_reason or "cancelled", self.request.grammar
        note, data = self._note(), None
        if grammar is not None and reason != "cancelled":
            # Whatever ended the reply, and whatever wrote it: only what the grammar calls whole counts.
            if reason != "length" and grammar.is_complete(self.tokens):
                data = grammar.value(self.tokens)
            elif not note:
                note = self._note_of_a_part()
        return Done(reason, self._stats, note, self.options.seed, data, self.stops.found)

    def close(self) -> None:
        """Let go of the cache, which is then free for another request."""
        self._peak.stop()
        self._held.close()
        vars(self).pop("cache", None)

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

    def _note_of_a_part(self) -> str:
        if self.finish_reason == "length":
            return f"The {len(self.tokens)} tokens end before the reply is what was asked for; raise max_tokens."
        return "The reply ended before it was what was asked for; leave out what stops it."


def cut_at_end(tokens: list[int], end_tokens: tuple[int, ...]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there is one."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[:position], True
    return tokens, False
