"""Filling the gaps of a text: the ways to fill them are denoised together, and the least surprising one is kept."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..checkpoints.accounting import rows_after
from ..errors import PromptError
from ..events import FinishReason, Stats
from ..generation.denoising import Denoising, Job
from ..generation.sampling import Draws
from ..model.budgets import TOGETHER
from .denoisers import InParts, Restricted
from .gaps import Gap, Row, Segment, lay_out, longest_gap, most_tokens
from .scoring import Cancelled, Probe, empty_thought, log_probabilities, noise_canvases

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..options import GenerationOptions
    from ..processing.images import PreparedImage
    from ..processing.processor import Processor, Prompt

EVERY = 32  # combinations of several gaps' fillings, up to which all are tried
NEIGHBOURS = 4  # tokens after a gap that tell best whether its length is right

Choices = tuple[int, ...]  # for each gap on a canvas, which of its fillings


@dataclass(frozen=True)
class Attempt:
    """One combination of lengths, in tokens, for the gaps on the canvas with this number (from 0), and how much the
    model was surprised, in nats, by what filled them and by the text around. The lowest was kept.
    """

    canvas: int
    lengths: tuple[int, ...]
    surprise: float


class GapFiller:
    """Fills the gaps of `segments`, the reply to `prompt`, canvas after canvas.

    ending: what follows the last segment; its last token fills the canvas up, as in training. None: the reply is open,
    and in a gap at the end the model may end it itself.
    options: nothing left open. replies: an empty thought comes first where the model begins its replies with one.
    cancel: once set, stops within one step; the gaps of the canvas at work stay open.
    Raises PromptError where a gap is longer than `longest_gap` allows, or everything than the context.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        processor: Processor,
        prompt: Prompt,
        segments: Sequence[Segment],
        ending: Sequence[int] | None,
        options: GenerationOptions,
        *,
        replies: bool,
        cancel: threading.Event | None = None,
    ):
        self.model, self.processor, self.prompt, self.options = model, processor, prompt, options
        self.segments, self.ending, self.replies = list(segments), ending, replies
        self.cancelled = cancel.is_set if cancel else lambda: False
        self.finish_reason: FinishReason = "stop"
        self.length, self.vocabulary = options.canvas_length, model.config.text.vocab_size
        self.noise = noise_canvases(options.seed, 1, self.length, self.vocabulary)[0]
        self.cache = model.make_cache()
        self.encoded = 0  # tokens of the reply in the cache
        self.filled: list[list[int]] = []  # tokens of each gap
        self.attempts: list[Attempt] = []
        self.steps: list[int] = []  # of each canvas
        self.row: Row | None = None  # the last canvas, filled
        self._check_room()

    def _check_room(self) -> None:
        most = longest_gap(self.length)
        for segment in self.segments:
            if isinstance(segment, Gap) and segment.longest > most:
                raise PromptError(f"{segment.longest} tokens are more than fit a hole; at most {most} are possible.")
        total = len(self.prompt.tokens) + most_tokens(self.segments)
        most = self.model.config.text.max_position_embeddings - 2 * self.length
        if total > most:
            raise PromptError(
                f"Prompt, text and holes have {total} tokens; beside a canvas, {most} fit this model's context."
            )

    @property
    def tokens(self) -> list[int]:
        """The reply, without the gaps that are still open."""
        return [token for segment in self.segments if not isinstance(segment, Gap) for token in segment]

    def run(self) -> Stats:
        """Fill every gap, in order; `filled`, `attempts`, `steps` and `finish_reason` say how. Returns what it cost."""
        mx.reset_peak_memory()
        started, prefilled = time.perf_counter(), None
        try:
            self._prefill(self.prompt.tokens, self.prompt.images)
            prefilled = time.perf_counter()
            self._fill()
        except Cancelled:
            self.finish_reason = "cancelled"
        ended = time.perf_counter()
        prefilled = prefilled or ended
        return Stats(
            prompt_tokens=len(self.prompt.tokens),
            generated_tokens=sum(map(len, self.filled)),
            steps=self.steps,
            prompt_seconds=prefilled - started,
            denoise_seconds=ended - prefilled,
            peak_memory_bytes=mx.get_peak_memory(),
        )

    def _prefill(self, tokens: Sequence[int], images: Sequence[PreparedImage] = ()) -> None:
        """Append tokens to the cache."""
        for _ in self.model.encode_chunks(mx.array([tokens]), self.cache, images):
            self._check_cancelled()

    def _check_cancelled(self) -> None:
        if self.cancelled():
            raise Cancelled

    def _fill(self) -> None:
        if self.replies:
            self.segments.insert(
                0, empty_thought(self.model, self.processor, self.prompt, self.cache, [self.noise], self.cancelled)
            )
        while any(isinstance(segment, Gap) for segment in self.segments):
            self._fill_canvas()

    def _fill_canvas(self) -> None:
        """Fill the gaps on the next canvas, and make them part of the text."""
        first = next(index for index, segment in enumerate(self.segments) if isinstance(segment, Gap))
        before = [token for segment in self.segments[:first] for token in segment]
        lead = self._lead(len(before), first)
        self._encode(before[: len(before) - lead])
        window = self._window(first, self.length - lead)
        self.steps.append(0)
        self.row = self._search([before[len(before) - lead :], *window])
        at = (index for index, segment in enumerate(window, first) if isinstance(segment, Gap))
        for index, (start, stop) in zip(at, self.row.gaps, strict=True):
            tokens = list(self.row.canvas.tokens[start:stop])
            ends = (place for place, token in enumerate(tokens) if token in self.options.end_tokens)
            self.segments[index] = tokens[: next(ends, len(tokens))]
            self.filled.append(self.segments[index])

    def _lead(self, before: int, first: int) -> int:
        """How many of the tokens `before` the gap lie with it on the canvas.

        A reply is cut into canvases from its first token on, as in training; a gap that would then have too little of
        what follows beside it begins a canvas of its own.
        """
        lead = before - max(before // self.length * self.length, self.encoded)
        return lead if self._fits(first, self.length - lead) else 0

    def _fits(self, index: int, room: int) -> bool:
        """Whether the gap at `index` fits, together with a fair part of what follows it."""
        after = most_tokens(self.segments[index + 1 :]) + len(self.ending or ())
        return self.segments[index].longest + min(after, self.length - longest_gap(self.length)) <= room

    def _window(self, first: int, room: int) -> list[Segment]:
        """The segments from the first gap up to a gap that does not fit; text may reach beyond the canvas."""
        window: list[Segment] = []
        for index, segment in enumerate(self.segments[first:], first):
            if isinstance(segment, Gap) and not self._fits(index, room):
                break
            window.append(segment)
            room = max(room - most_tokens([segment]), 0)
        return window

    def _encode(self, before: list[int]) -> None:
        """Append what is new of the text before the canvas to the cache."""
        if len(before) > self.encoded:
            self._prefill(before[self.encoded :])
            self.encoded = len(before)

    def _search(self, window: list[Segment]) -> Row:
        """The best row. Up to EVERY combination is tried; where there are more, one gap after the other is varied while
        the others keep the best so far, at first their longest filling.
        """
        gaps = [segment for segment in window if isinstance(segment, Gap)]
        every = [range(len(gap.fillings)) for gap in gaps]
        if math.prod(map(len, every)) <= EVERY:
            return self._try(window, list(itertools.product(*every)))[1]
        best = tuple(max(range(len(g.fillings)), key=lambda i, g=g: len(g.fillings[i].tokens)) for g in gaps)
        for number, own in enumerate(every):
            varied = [(*best[:number], choice, *best[number + 1 :]) for choice in own]
            best, row = self._try(window, varied)
        return row

    def _try(self, window: list[Segment], combinations: list[Choices]) -> tuple[Choices, Row]:
        """Denoise the combinations, TOGETHER at a time; returns the best, ties to the shorter, and its row."""
        ending = self.ending if window[-1] is self.segments[-1] else None
        starts = [lay_out(window, choices, self.length, ending) for choices in combinations]
        rows = [
            row for first in range(0, len(starts), TOGETHER) for row in self._denoise(starts[first : first + TOGETHER])
        ]
        surprises = self._surprises(rows)
        canvas = len(self.steps) - 1
        self.attempts += [Attempt(canvas, row.lengths, value) for row, value in zip(rows, surprises, strict=True)]
        best = min(range(len(rows)), key=lambda index: (surprises[index], sum(rows[index].lengths)))
        return combinations[best], rows[best]

    def _denoise(self, rows: list[Row]) -> list[Row]:
        """Run the rows together. Once one is done, the others get as many steps again: what fits settles early."""
        if all(all(row.canvas.pinned) for row in rows):
            return rows
        denoiser = InParts(self.model, rows_after(self.cache, len(rows)))
        canvas, attempt = len(self.steps) - 1, len(self.attempts)
        jobs = [
            Job(row.canvas, self.cache, Draws(self.options.seed, number, canvas, attempt))
            for number, row in enumerate(rows)
        ]
        restricted = any(ids is not None for row in rows for ids in row.allowed)
        allowed = {job: row.allowed for job, row in zip(jobs, rows, strict=True)}
        reader = Restricted(self.model, denoiser, allowed) if restricted else None
        run = Denoising(denoiser, self.options, self.vocabulary, reader)
        for job in jobs:
            run.add(job)
        last, tokens = self.options.max_steps, {}
        with closing(run.steps()) as steps:
            for number, shown in enumerate(steps, start=1):
                self.steps[-1] += 1
                self._check_cancelled()
                tokens |= {step.job: step.tokens for step in shown}
                if any(step.finished for step in shown):
                    last = min(last, 2 * number)
                if number >= last:
                    break
        return [row.filled(tokens[job]) for row, job in zip(rows, jobs, strict=True)]

    def _surprises(self, rows: list[Row]) -> list[float]:
        """Of each filled row: minus the log probability of every token from the first gap up to where the text ends on
        all of the canvases, each with all others in place.

        A token that is seen in its place is nearly always believed, right or wrong. So noise takes the place of those
        that the model did not write and that must fit what it wrote: of the NEIGHBOURS tokens after a gap, all at once,
        and of what was given for a gap, one at a time.
        """
        common = min(row.end - row.gaps[-1][1] for row in rows)
        probes: list[list[Probe]] = []
        for row in rows:
            tokens = tuple(row.canvas.tokens)
            inside = {place for span in row.gaps for place in range(*span)}
            left_out: dict[int, set[int]] = {}  # for a place, those with noise while it is asked for
            for (start, stop), fixed in zip(row.gaps, row.fixed, strict=True):
                left_out |= {place: {place} for place in range(start, stop) if fixed}
                after = set(range(stop, min(stop + NEIGHBOURS, row.end))) - inside
                left_out |= dict.fromkeys(after, after)
            places = range(row.gaps[0][0], row.gaps[-1][1] + common)
            probes.append([self.probe(tokens, place, left_out.get(place, set())) for place in places])
        values = iter(self.log_probabilities(list(itertools.chain.from_iterable(probes))))
        return [-sum(itertools.islice(values, len(own))) for own in probes]

    def log_probabilities(self, probes: Sequence[Probe]) -> list[float]:
        """See `scoring`. Raises Cancelled."""
        return log_probabilities(self.model, self.cache, probes, self.cancelled)

    def probe(self, tokens: tuple[int, ...], place: int, left_out: Collection[int]) -> Probe:
        """Asks for the token at `place`, with noise at the places that are left out."""
        if not left_out:
            return Probe(tokens, place, tokens[place])
        canvas = tuple(self.noise[at] if at in left_out else token for at, token in enumerate(tokens))
        return Probe(canvas, place, tokens[place])
