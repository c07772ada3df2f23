"""The diffusion decoder: canvas after canvas is denoised, and committed when it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ...events import Draft, Event, join_text
from ...processing.replies import merge
from ..denoising import Denoising, Job, Step
from ..sampling import Draws
from ..writer import cut_at_end
from .active_rows import ActiveRows

if TYPE_CHECKING:
    from ...model.diffusion_gemma import DiffusionGemma
    from ...options import Settings
    from ..writer import Writer


class Diffusion:
    """Canvases denoised together, each at its own step; a reply goes on, or makes room, as soon as its own is done."""

    def __init__(self, model: DiffusionGemma, options: Settings) -> None:
        self.model = model
        denoising = ActiveRows if options.active_rows else Denoising
        self._run: Denoising = denoising(model, options, model.config.text.vocab_size)
        self._replies: dict[Job, _Reply] = {}

    def add(self, writer: Writer) -> Iterator[Event]:
        yield from writer.read_prompt()
        if not writer.finish_reason:
            self._begin(_Reply(writer))

    def drop(self, leaving: Sequence[Writer]) -> None:
        self._end([job for job, reply in self._replies.items() if reply.writer in leaving])

    def step(self) -> Iterator[tuple[Writer, Event]]:
        for step in self._run.step():
            reply = self._replies[step.job]
            writer = reply.writer
            yield writer, reply.draft(step)
            writer.notice_cancel()
            if writer.finish_reason:
                self._end([step.job])
            elif step.finished:
                del self._replies[step.job]
                if not reply.retries():
                    yield writer, reply.commit()
                if not writer.finish_reason:
                    self._begin(reply)

    def _begin(self, reply: _Reply) -> None:
        job = reply.next_job(self.model)
        self._replies[job] = reply
        self._run.add(job)

    def _end(self, jobs: list[Job]) -> None:
        self._run.drop(jobs)
        for job in jobs:
            del self._replies[job]


class _Reply:
    """The canvas at hand of one reply, and what became of those before it."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.number = self.attempt = 0  # of the canvas at hand
        self.tokens: list[int] = []  # its argmax tokens after the last step
        self.committed = False  # and not encoded yet
        self.steps = self.wasted = 0  # what it took, and what earlier attempts at it took

    def next_job(self, model: DiffusionGemma) -> Job:
        """Begin the next attempt at a canvas, or the next canvas; the encoder first reads one that was committed."""
        writer = self.writer
        if self.committed:
            model.encode(mx.array([self.tokens]), writer.cache)
            writer.count(passes=1)
            self.number, self.attempt, self.wasted, self.committed = self.number + 1, 0, 0, False
        start = writer.request.canvas.part(self.number, writer.options.canvas_length)
        return Job(start, writer.cache, Draws(writer.options.seed, 0, self.number, self.attempt))

    def draft(self, step: Step) -> Draft:
        """Take in a step of the canvas at hand."""
        self.tokens, self.steps = step.tokens, step.number
        max_steps = self.writer.options.max_steps
        return draft_of(self.writer, step.number, max_steps, step.tokens, step.accepted, step.entropy)

    def retries(self) -> bool:
        """Whether the canvas at hand is to be denoised once more: it would end the reply before its first token."""
        options = self.writer.options
        is_first = self.number == 0 and not self.writer.request.canvas.tokens
        if not is_first or self.attempt == options.retries or self.tokens[0] not in options.end_tokens:
            return False
        self.attempt += 1
        self.wasted += self.steps
        self.writer.count(retries=1)
        return True

    def commit(self) -> Event:
        """Take the canvas in."""
        writer, steps = self.writer, self.wasted + self.steps
        self.committed = True
        writer.count(steps=steps)
        return writer.take(self.tokens, steps=steps, last=writer.context < 2 * writer.options.canvas_length)


def draft_of(
    writer: Writer, step: int, max_steps: int, tokens: list[int], accepted: list[bool], entropy: list[float]
) -> Draft:
    """A step of a reply's canvas, as an event: what the reply would gain if these tokens were committed now."""
    before_end, _ = cut_at_end(tokens, writer.options.end_tokens)
    by_token = writer.parser.preview(before_end)
    by_token[0][:0] = writer.stops.held_parts
    parts = merge([part for own in by_token for part in own])
    pieces = ["".join(text for _, text in own) for own in by_token]
    return Draft(
        canvas=writer.commits,
        step=step,
        max_steps=max_steps,
        tokens=tokens,
        accepted=accepted,
        entropy=entropy,
        text=join_text(parts),
        parts=parts,
        pieces=pieces + [""] * (len(tokens) - len(pieces)),
    )
