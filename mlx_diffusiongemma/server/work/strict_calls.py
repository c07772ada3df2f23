"""Replies whose tool calls fit what strict tools declare, where the model may call or not.

Under a grammar of "text or calls", a causal pass would choose every token of the text as well. So a reply is written
freely, by the decoder that was asked for, and each call is checked by the grammar of calls before it goes out. The
first that does not fit is left out with all that came after it, and the reply ends in a call that is written under that
grammar instead: of the tool that was named or, where no strict tool has that name, of any of them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...events import Commit, Done, Draft, Event, Prefill, Stats
from ...generation.replying import stream
from ...generation.request import request_options
from ...options import GenerationOptions
from ...processing.processor import Prompt
from ...processing.replies import calls_in
from ...processing.tools import parse_tool_calls

if TYPE_CHECKING:
    from ...generation.canvas import Canvas
    from ...model.diffusion_gemma import DiffusionGemma
    from ...processing.processor import Processor
    from .waiting import Turn

BEGIN, END = "<|tool_call>", "<tool_call|>"


def strict_tools(prompt: Prompt) -> tuple[dict[str, Any], ...]:
    """Find the tools of a prompt whose calls have to fit."""
    return tuple(tool for tool in prompt.tools if tool["function"].get("strict"))


class StrictCalls:
    """Checks a reply's calls as they are committed. Raises PromptError where a strict tool's declaration cannot be
    honoured.

    tokens: of the reply so far, up to what was left out. calls: those so far that can be read.
    """

    def __init__(self, model: DiffusionGemma, processor: Processor, prompt: Prompt, options: GenerationOptions) -> None:
        strict = strict_tools(prompt)
        self._strict = {tool["function"]["name"] for tool in strict}
        self._loose = {tool["function"]["name"] for tool in prompt.tools} - self._strict
        ends = request_options(model, options).end_tokens
        self._grammar = processor.grammar(Prompt("", [], tools=strict), ends, tool_choice="required")
        self._tokenizer = processor.tokenizer
        self._begin = self._tokenizer.convert_tokens_to_ids(BEGIN)
        self.tokens: list[int] = []
        self.calls = 0
        self._written = 0  # calls so far, readable or not

    def take(self, commit: Commit) -> tuple[Commit, str | None]:
        """Take in the next commit. Returns it up to the first call that does not fit, and the tool to call instead, as
        `tool_choice` has it; None where all of them fit.
        """
        start = len(self.tokens)
        self.tokens += commit.tokens
        for number, (kind, text) in enumerate(commit.parts):
            if kind != "tool_call":
                continue
            if (choice := self._instead_of(text)) is not None:
                begins = [place for place, token in enumerate(self.tokens) if token == self._begin]
                del self.tokens[begins[self._written] :]
                parts = commit.parts[:number]
                calls = commit.tool_calls[: len(calls_in(parts, 1))]
                self.calls += len(calls)
                return replace(commit, tokens=self.tokens[start:], parts=parts, tool_calls=calls), choice
            self._written += 1
        self.calls += len(commit.tool_calls)
        return commit, None

    def _instead_of(self, text: str) -> str | None:
        named = text.removeprefix("call:").partition("{")[0].strip()
        if ({call.name for call in parse_tool_calls(text)} or {named}) <= self._loose:
            return None
        tokens = self._tokenizer.encode(f"{BEGIN}{text}{END}", add_special_tokens=False)
        if self._grammar.is_complete(tokens):
            return None
        return named if named in self._strict else "required"


def stream_strictly(
    turn: Turn, prompt: Prompt, options: GenerationOptions, canvas: Canvas | None = None
) -> Generator[Event, None, None]:
    """Stream a reply, as `generation.replying.stream` does, in which every call of a strict tool fits."""
    if options.seed is None:  # of the whole reply, in one part or two
        options = replace(options, seed=secrets.randbits(63))
    calls = StrictCalls(turn.model, turn.processor, prompt, options)
    cost = _Cost(len(prompt.tokens))
    choice: str | None = None
    freely = stream(
        turn.model, turn.processor, prompt, canvas=canvas, options=options, cache=turn.cache, cancel=turn.cancel
    )
    with closing(freely):
        for event in freely:
            cost.count(event)
            if isinstance(event, Commit):
                event, choice = calls.take(event)
            yield event
            if choice is not None:
                break
    if choice is None:
        return
    written, so_far = len(calls.tokens), cost.stats
    again = replace(
        prompt,
        tokens=[*prompt.tokens, *calls.tokens],
        first_call=prompt.first_call + calls.calls,
        tools=strict_tools(prompt),
        thinking=False,
    )
    room = request_options(turn.model, options).max_tokens - written
    options = replace(options, max_tokens=room, stability=None, confidence=None, active_rows=None)
    called = stream(
        turn.model,
        turn.processor,
        again,
        tool_choice=choice,
        options=options,
        cache=turn.cache,
        cancel=turn.cancel,
    )
    for event in called:
        match event:
            case Draft() | Commit():
                yield replace(event, canvas=event.canvas + len(so_far.steps))
            case Done():
                yield replace(event, stats=_joined(so_far, event.stats, written))


class _Cost:
    """Counts what a reply cost that may be given up before its last event, which would tell."""

    def __init__(self, prompt_tokens: int) -> None:
        self._stats = Stats(prompt_tokens)
        self._started = self._read = time.perf_counter()
        self._reads = 0

    def count(self, event: Event) -> None:
        if isinstance(event, Prefill):
            if not self._reads:
                self._stats = replace(self._stats, cached_tokens=event.done)
            self._reads, self._read = self._reads + 1, time.perf_counter()
        elif isinstance(event, Commit):
            self._stats = replace(self._stats, steps=[*self._stats.steps, event.steps])

    @property
    def stats(self) -> Stats:
        now = time.perf_counter()
        return replace(self._stats, prompt_seconds=self._read - self._started, denoise_seconds=now - self._read)


def _joined(first: Stats, second: Stats, written: int) -> Stats:
    """The cost of a reply in two parts. written: tokens of the first part that count. What the second reads again is
    part of writing.
    """
    return replace(
        second,
        prompt_tokens=first.prompt_tokens,
        cached_tokens=first.cached_tokens,
        generated_tokens=written + second.generated_tokens,
        steps=[*first.steps, *second.steps],
        prompt_seconds=first.prompt_seconds,
        denoise_seconds=first.denoise_seconds + second.prompt_seconds + second.denoise_seconds,
    )
