"""Filling the gaps of a text: the ways to fill them are denoised together, and the least surprising one is kept."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ..checkpoints.accounting import rows_after
from ..checkpoints.memory import PeakMemory
from ..errors import PromptError
from ..events import Commit, Done, Draft, Event, Filled, FinishReason, Prefill, Stats
from ..generation.denoising import Denoising, Job, Step
from ..generation.prefix import encode_prompt
from ..generation.sampling import Draws
from ..model.budgets import TOGETHER
from .denoisers import InParts, Restricted
from .gaps import Gap, GappedCanvas, Piece, Segment, given_tokens, lay_out, least_room, longest_gap, most_tokens
from .scoring import Cancelled, Probe, log_probabilities, noise_canvases, reply_opening

if TYPE_CHECKING:
    from ..generation.request import Request
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor

EVERY = 32  # combinations of several gaps' fillings, up to which all are tried
NEIGHBOURS = 4  # tokens after a gap that tell best whether its length is right

Choices = tuple[int, ...]  # for each gap on a canvas, which of its fillings

NOTHING: tuple[int, list[int], int] = (0, [], 0)  # of a commit: its canvas, tokens and steps


class Full(Exception):
    """No filling fits the tokens that were asked for."""


@dataclass(frozen=True)
class Attempt:
    """One combination of lengths, in tokens, for the gaps on the canvas with this number (from 0), and how much the
    model was surprised, in nats, by what filled them and by the text around. The lowest was kept.
    """

    canvas: int
    lengths: tuple[int, ...]
    surprise: float


class GapFiller:
    """Fills the gaps of `segments`, the reply to a request's prompt, canvas after canvas.

    ending: what follows the last segment; its last token fills the canvas up, as in training. None: the reply is open,
    and in a gap at the end the model may end it itself.
    pieces: the text that all this makes.
    replies: an empty thought comes first where the model begins its replies with one.
    at_once: the text counts only when every gap is filled; else what precedes the first open gap is certain.
    on_event: is called with `Prefill`s, then `Draft`s of the most certain try, a `Filled` as gaps are decided and
    `Commit`s of the text that became certain, then `Done`. Joined, the commits are `text`.
    The request's `max_tokens` bounds all gaps together. Cancelled, the gaps of the canvas at work stay open.
    Raises PromptError where a gap is longer than `longest_gap` allows, or everything than the context.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        processor: Processor,
        request: Request,
        segments: Sequence[Segment],
        ending: Sequence[int] | None,
        pieces: Sequence[Piece],
        *,
        replies: bool,
        at_once: bool = False,
        on_event: Callable[[Event], object] | None = None,
    ):
        self.model, self.processor, self.request, self.options = model, processor, request, request.options
        self.segments, self.ending, self.replies = list(segments), ending, replies
        self.pieces, self.at_once = pieces, at_once
        self.report = on_event or (lambda event: None)
        self.reported = 0  # characters of the text that commits had
        self.unreported = NOTHING
        self.finish_reason: FinishReason = "stop"
        self.length, self.vocabulary = self.options.canvas_length, model.config.text.vocab_size
        self.noise = noise_canvases(self.options.seed, 1, self.length, self.vocabulary)[0]
        self.cache = model.make_cache(snapshot_bytes=0) if request.cache is None else request.cache
        self.encoded = 0  # tokens of the reply in the cache
        self.gaps = sum(isinstance(segment, Gap) for segment in segments)
        self.filled: list[list[int]] = []  # tokens of each gap
        self.attempts: list[Attempt] = []
        self.steps: list[int] = []  # of each canvas
        self.canvas: GappedCanvas  # the last one, filled
        self.stats = Stats(prompt_tokens=len(request.prompt.tokens))
        self._check_room()

    def _check_room(self) -> None:
        most = longest_gap(self.length)
        for segment in self.segments:
            if isinstance(segment, Gap) and segment.longest > most:
                raise PromptError(f"{segment.longest} tokens are more than fit a hole; at most {most} are possible.")
        total = len(self.request.prompt.tokens) + most_tokens(self.segments)
        most = self.model.config.text.max_position_embeddings - 2 * self.length
        if total > most:
            raise PromptError(
                f"Prompt, text and holes have {total} tokens; beside a canvas, {most} fit this model's context."
            )

    @property
    def tokens(self) -> list[int]:
        """The reply, without the gaps that are still open."""
        return given_tokens(self.segments)

    @property
    def text(self) -> str:
        """The whole text; "" where it counts only when every gap is filled, and one is open."""
        if self.at_once and self.finish_reason != "stop":
            return ""
        filled = iter(self.filled)
        return "".join(piece if isinstance(piece, str) else piece(next(filled, None)) for piece in self.pieces)

    def run(self, finish: Callable[[], None] = lambda: None) -> Stats:
        """Fill every gap, in order; `filled`, `attempts`, `steps` and `finish_reason` say how. Returns what it cost.

        finish: asks something of the filled canvas, at the end, while the prefix is still there.
        """
        kept = self.request.cache
        peak, started, prefilled = PeakMemory(), time.perf_counter(), None
        try:
            with nullcontext() if kept is None else kept.reserved():
                self._read_prompt()
                prefilled = time.perf_counter()
                self.report(Filled(0, self.gaps))
                self._commit(*NOTHING)
                self._fill()
                finish()
        except Cancelled:
            self.finish_reason = "cancelled"
        except Full:
            self.finish_reason = "length"
        finally:
            peak_bytes = peak.stop()
        self._commit(*(self.unreported if self.finish_reason == "stop" else NOTHING), is_over=True)
        ended = time.perf_counter()
        prefilled = prefilled or ended
        self.stats = replace(
            self.stats,
            generated_tokens=sum(map(len, self.filled)),
            steps=self.steps,
            prompt_seconds=prefilled - started,
            denoise_seconds=ended - prefilled,
            peak_memory_bytes=peak_bytes,
        )
        self.report(Done(self.finish_reason, self.stats, seed=self.options.seed))
        return self.stats

    def _read_prompt(self) -> None:
        """Make the cache hold the prompt; what it has of it is not encoded again."""
        total = len(self.request.prompt.tokens)
        for number, done in enumerate(encode_prompt(self.model, self.cache, self.request.prompt)):
            if number == 0:
                self.stats = replace(self.stats, cached_tokens=done)
            self.report(Prefill(done, total))
            self._check_cancelled()

    def _encode(self, before: list[int]) -> None:
        """Append so much of the reply to the cache, which keeps its way back to the prompt for the next request."""
        if len(before) > self.encoded:
            for _ in self.model.encode_chunks(mx.array([before[self.encoded :]]), self.cache):
                self._check_cancelled()
            self.encoded = len(before)

    def _check_cancelled(self) -> None:
        if self.request.cancelled:
            raise Cancelled

    def _fill(self) -> None:
        if self.replies:
            opening = reply_opening(
                self.model, self.processor, self.request.prompt, self.cache, self.length, self._is_cancelled
            )
            self.segments.insert(0, opening)
        while any(isinstance(segment, Gap) for segment in self.segments):
            self._fill_canvas()

    def _is_cancelled(self) -> bool:
        return self.request.cancelled

    def _fill_canvas(self) -> None:
        """Fill the gaps on the next canvas, and make them part of the text."""
        first = next(index for index, segment in enumerate(self.segments) if isinstance(segment, Gap))
        before = given_tokens(self.segments[:first])
        lead = self._lead(len(before), first)
        window = self._window(first, self.length - lead)
        if least_room(window) > self.options.max_tokens - sum(map(len, self.filled)):
            raise Full
        self._encode(before[: len(before) - lead])
        self.steps.append(0)
        self.canvas = self._search([before[len(before) - lead :], *window], lead)
        tokens = self.canvas.tokens
        at = (index for index, segment in enumerate(window, first) if isinstance(segment, Gap))
        for index, (start, stop) in zip(at, self.canvas.gaps, strict=True):
            gap = tokens[start:stop]
            ends = (place for place, token in enumerate(gap) if token in self.options.end_tokens)
            self.filled.append(gap[: next(ends, len(gap))])
            self.segments[index] = self.filled[-1]
        made = len(self.steps) - 1, tokens[lead : self._text_end(window, lead)], self.steps[-1]
        if self.at_once:
            self.unreported = made
        else:
            self._commit(*made)

    def _text_end(self, window: Sequence[Segment], lead: int) -> int:
        """The place behind the text on the canvas that was filled: before its ending, and before an end token that the
        model wrote into an open gap at the end.
        """
        whole = lead + sum(len(s) for s in window if not isinstance(s, Gap)) + sum(self.canvas.lengths)
        if isinstance(window[-1], Gap) and self.ending is None:
            whole -= self.canvas.lengths[-1] - len(self.filled[-1])
        return min(whole, self.length)

    def _commit(self, canvas: int, tokens: list[int], steps: int, is_over: bool = False) -> None:
        """Report the text that has become certain; when all is over, that is everything."""
        text = self.text if is_over else self._certain_text()
        new, self.reported = text[self.reported :], len(text)
        if new or tokens:
            self.report(Commit(canvas, tokens, [("text", new)] * bool(new), steps))

    def _certain_text(self) -> str:
        """The text that no gap still open can change."""
        filled, text = iter(self.filled), ""
        for piece in self.pieces:
            if isinstance(piece, str):
                text += piece
            elif (gap := next(filled, None)) is not None:
                text += piece(gap)
            else:
                return "" if self.at_once else text
        return text

    def _draft(self, canvas: GappedCanvas, lead: int, step: Step | None) -> None:
        """Report a step of a canvas, or one that was not denoised, from where its text is not certain yet."""
        tokens = canvas.tokens if step is None else step.tokens
        accepted = [True] * len(tokens) if step is None else step.accepted
        entropy = [0.0] * len(tokens) if step is None else step.entropy
        settled = [a or pinned for a, pinned in zip(accepted, canvas.canvas.pinned, strict=True)]
        pieces = self.processor.token_texts(tokens[lead : canvas.end])
        self.report(
            Draft(
                canvas=len(self.steps) - 1,
                step=1 if step is None else step.number,
                max_steps=self.options.max_steps,
                tokens=tokens[lead:],
                accepted=settled[lead:],
                entropy=entropy[lead:],
                text="".join(pieces),
                parts=[("text", "".join(pieces))],
                pieces=pieces + [""] * (len(tokens) - canvas.end),
            )
        )

    def _lead(self, before: int, first: int) -> int:
        """Count the tokens `before` the gap that lie with it on the canvas.

        A reply is cut into canvases from its first token on, as in training; a gap that would then have too little of
        what follows beside it begins a canvas of its own.
        """
        lead = before - max(before // self.length * self.length, self.encoded)
        return lead if self._fits(first, self.length - lead) else 0

    def _fits(self, index: int, room: int) -> bool:
        """Whether the gap at `index` fits, together with a fair part of what follows it."""
        after = most_tokens(self.segments[index + 1 :]) + len(self.ending or ())
        return most_tokens([self.segments[index]]) + min(after, self.length - longest_gap(self.length)) <= room

    def _window(self, first: int, room: int) -> list[Segment]:
        """The segments from the first gap up to a gap that does not fit; text may reach beyond the canvas."""
        window: list[Segment] = []
        for index, segment in enumerate(self.segments[first:], first):
            if isinstance(segment, Gap) and not self._fits(index, room):
                break
            window.append(segment)
            room = max(room - most_tokens([segment]), 0)
        return window

    def _search(self, window: list[Segment], lead: int) -> GappedCanvas:
        """The best canvas. Up to EVERY combination is tried; where there are more, one gap after the other is varied
        while the others keep the best so far, at first their longest filling. Raises Full.
        """
        gaps = [segment for segment in window if isinstance(segment, Gap)]
        sizes = [[len(filling.tokens) for filling in gap.fillings] for gap in gaps]
        room = self.options.max_tokens - sum(map(len, self.filled))

        def fits(choices: Choices) -> bool:
            return sum(own[choice] for own, choice in zip(sizes, choices, strict=True)) <= room

        every = [range(len(own)) for own in sizes]
        if math.prod(map(len, every)) <= EVERY:
            canvas = self._try(window, lead, list(filter(fits, itertools.product(*every))))[1]
            self.report(Filled(len(self.filled) + len(gaps), self.gaps))
            return canvas
        best = tuple(own.index(max(own)) for own in sizes)
        if not fits(best):
            best = tuple(own.index(min(own)) for own in sizes)
        for number, own in enumerate(every):
            varied = [(*best[:number], choice, *best[number + 1 :]) for choice in own]
            best, canvas = self._try(window, lead, list(filter(fits, varied)))
            self.report(Filled(len(self.filled) + number + 1, self.gaps))
        return canvas

    def _try(self, window: list[Segment], lead: int, combinations: list[Choices]) -> tuple[Choices, GappedCanvas]:
        """Denoise the combinations, TOGETHER at a time; returns the best, ties to the shorter, and its canvas."""
        if not combinations:
            raise Full
        ending = self.ending if window[-1] is self.segments[-1] else None
        starts = [lay_out(window, choices, self.length, ending) for choices in combinations]
        tried: list[tuple[GappedCanvas, Step | None]] = []
        for first in range(0, len(starts), TOGETHER):
            tried += self._denoise(starts[first : first + TOGETHER], lead, first)
        canvases = [canvas for canvas, _ in tried]
        surprises = self._surprises(canvases)
        number = len(self.steps) - 1
        self.attempts += [Attempt(number, own.lengths, value) for own, value in zip(canvases, surprises, strict=True)]
        best = min(range(len(canvases)), key=lambda index: (surprises[index], sum(canvases[index].lengths)))
        self._draft(canvases[best], lead, tried[best][1])
        return combinations[best], canvases[best]

    def _denoise(self, starts: list[GappedCanvas], lead: int, first: int) -> list[tuple[GappedCanvas, Step | None]]:
        """Run the canvases together. Once one is done, the others get as many steps again: what fits settles early.

        Returns each as it was last, with that step; None where nothing was open.
        """
        if all(all(start.canvas.pinned) for start in starts):
            return [(start, None) for start in starts]
        denoiser = InParts(self.model, rows_after(self.cache, len(starts)))
        number, attempt = len(self.steps) - 1, len(self.attempts)
        canvases = {
            Job(start.canvas, self.cache, Draws(self.options.seed, row, number, attempt)): start
            for row, start in enumerate(starts, first)
        }
        restricted = any(ids is not None for start in starts for ids in start.allowed)
        allowed = {job: start.allowed for job, start in canvases.items()}
        reader = Restricted(self.model, denoiser, allowed) if restricted else None
        run = Denoising(denoiser, self.options, self.vocabulary, reader)
        # The longest begins alone: a first draft costs one canvas, however many are compared.
        waiting = sorted(canvases, key=lambda job: sum(canvases[job].lengths))
        run.add(waiting.pop())
        taken = self.steps[-1]
        last = self.options.max_steps
        latest: dict[Job, Step] = {}
        with closing(run.steps()) as steps:
            for shown in steps:
                self.steps[-1] = max(self.steps[-1], taken + max(step.number for step in shown))
                self._check_cancelled()
                latest |= {step.job: step for step in shown}
                surest = min(shown, key=lambda step: sum(step.entropy))
                self._draft(canvases[surest.job], lead, surest)
                while waiting:
                    run.add(waiting.pop())
                last = min([last, *(2 * step.number for step in shown if step.finished)])
                run.drop([step.job for step in shown if step.number >= last])
        return [(start.filled(latest[job].tokens), latest[job]) for job, start in canvases.items()]

    def _surprises(self, rows: list[GappedCanvas]) -> list[float]:
        """The surprise of each filled canvas to the model, in nats: minus the log probability of every token from the
        first gap up to where the text ends on all of the canvases, each with all others in place.

        A token that is seen in its place is nearly always believed, right or wrong. So noise takes the place of those
        that the model did not write and that must fit what it wrote: of the NEIGHBOURS tokens after a gap, all at once,
        and of what was given for a gap, one at a time.
        """
        common = min(row.end - row.gaps[-1][1] for row in rows)
        probes: list[list[Probe]] = []
        for row in rows:
            tokens = tuple(row.tokens)
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
        return log_probabilities(self.model, self.cache, probes, self._is_cancelled)

    def probe(self, tokens: tuple[int, ...], place: int, left_out: Collection[int]) -> Probe:
        """Asks for the token at `place`, with noise at the places that are left out."""
        if not left_out:
            return Probe(tokens, place, tokens[place])
        canvas = tuple(self.noise[at] if at in left_out else token for at, token in enumerate(tokens))
        return Probe(canvas, place, tokens[place])
