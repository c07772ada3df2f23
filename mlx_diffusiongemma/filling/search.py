"""Filling the gaps of a text: how long each is, is read off the first steps; what follows is then pinned there."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from ..checkpoints.memory import PeakMemory
from ..errors import PromptError
from ..events import Commit, Done, Draft, Event, Filled, FinishReason, Prefill, Stats
from ..generation.prefix import encode_prompt
from .gaps import Anchor, Gap, Piece, Segment, before_stop, given_tokens, most_tokens
from .scoring import Cancelled, reply_opening, surprises
from .settling import Settling, Try
from .window import Window, open_window

if TYPE_CHECKING:
    from ..generation.request import Request
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor

NOTHING: tuple[int, list[int], int] = (0, [], 0)  # of a commit: its canvas, tokens and steps


class Full(Exception):
    """No filling fits the tokens that were asked for."""


@dataclass(frozen=True)
class Attempt:
    """Lengths, in tokens, that the gaps on the canvas with this number (from 0) were filled with.

    evidence: the nats by which the first steps found the text after the gaps likelier there than by chance. surprise:
    where there were rivals, how much it surprises the model, in nats, what filled the gaps and what follows them; the
    lowest was kept.
    """

    canvas: int
    lengths: tuple[int, ...]
    evidence: float
    surprise: float | None = None


class GapFiller:
    """Fills the gaps of `segments`, the reply to a request's prompt, canvas after canvas.

    A canvas begins with the text before its first gap pinned and the rest open. Its first steps say where the text
    after each gap fits, whatever the gap's length; there it is pinned, and denoising goes on. Text that fits nowhere on
    the canvas lies beyond it: the gap then goes on there, as a reply does.

    ending: what follows the last segment; its last token fills the canvas up, as in training. None: the reply is open,
    and in a gap at the end the model may end it itself.
    pieces: the text that all this makes.
    replies: an empty thought comes first where the model begins its replies with one.
    at_once: the text counts only when every gap is filled; else what precedes the first open gap is certain.
    keeps_drafts: where it ends early, the gaps of the canvas at work are filled with their last draft.
    tries: how many ways to fill a canvas are denoised; None is one, or up to three where they are hard to tell apart.
    seconds: after which the best so far is kept.
    on_event: is called with `Prefill`s, then `Draft`s of the most certain try, a `Filled` as gaps are decided and
    `Commit`s of the text that became certain, then `Done`. Joined, the commits are `text`.
    The request's `max_tokens` bounds all gaps together. Raises PromptError where the prompt and all that is needed of
    the rest are longer than the context.
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
        keeps_drafts: bool = True,
        tries: int | None = None,
        seconds: float | None = None,
        on_event: Callable[[Event], object] | None = None,
    ):
        self.model, self.processor, self.request, self.options = model, processor, request, request.options
        self.segments, self.ending, self.replies = list(segments), ending, replies
        self.pieces, self.at_once, self.keeps_drafts = pieces, at_once, keeps_drafts and not at_once
        self.tries, self.seconds = tries, seconds
        self.report = on_event or (lambda event: None)
        self.reported = 0  # characters of the text that commits had
        self.unreported = NOTHING
        self.finish_reason: FinishReason = "stop"
        self.length, self.vocabulary = self.options.canvas_length, model.config.text.vocab_size
        self.cache = model.make_cache(snapshot_bytes=0) if request.cache is None else request.cache
        self.encoded = 0  # tokens of the reply in the cache
        self.earlier: list[int] = []  # tokens of the first open gap that lie on canvases already done
        self.doubts: list[float] = []  # the entropies of those
        self.filled: list[list[int]] = []  # tokens of each gap and anchor
        self.entropies: list[list[float]] = []  # at each of those, after its last step
        self.attempts: list[Attempt] = []
        self.rivals: list[tuple[list[list[int]], float]] = []  # on the last canvas: what fills its gaps, its surprise
        self.steps: list[int] = []  # of each canvas
        self.best: Try | None = None  # of the canvas at work, or the last one
        self.drafted: Draft | None = None  # the last one reported
        self.stats = Stats(prompt_tokens=len(request.prompt.tokens))
        self.spans = sum(not isinstance(piece, str) for piece in pieces)
        self._check_room()

    def _check_room(self) -> None:
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
        return "" if self.at_once and self.finish_reason != "stop" else self.text_with([])

    def text_with(self, last: Sequence[list[int]]) -> str:
        """The whole text with other tokens in the last gaps; what stands for a gap while it is open stands there."""
        texts = zip(self.pieces, self._read(self.filled_with(last)), strict=True)
        return "".join((text if text is not None else piece.read(None)) for piece, text in texts)  # type: ignore[union-attr]

    def filled_with(self, last: Sequence[list[int]]) -> list[list[int]]:
        """The tokens of each gap, with others in the last ones."""
        return [*self.filled[: len(self.filled) - len(last)], *last]

    def run(self, finish: Callable[[], None] = lambda: None) -> Stats:
        """Fill every gap, in order; `filled`, `attempts`, `steps` and `finish_reason` say how. Returns what it cost.

        finish: asks something of the filled canvas, at the end, while the prefix is still there.
        """
        kept = self.request.cache
        peak, started, prefilled = PeakMemory(), time.perf_counter(), None
        self.deadline = math.inf if self.seconds is None else started + self.seconds
        try:
            with nullcontext() if kept is None else kept.reserved():
                self._read_prompt()
                prefilled = time.perf_counter()
                self.report(Filled(0, self.spans))
                self._commit(*NOTHING)
                self._fill()
                finish()
        except Cancelled:
            self.finish_reason = "cancelled" if self.request.cancelled else "length"
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

    def is_over(self) -> bool:
        """Whether nobody waits for more: it was cancelled, or has taken its time."""
        return self.request.cancelled or time.perf_counter() > self.deadline

    def _check_cancelled(self) -> None:
        if self.is_over():
            raise Cancelled

    def _fill(self) -> None:
        if self.replies:
            opening = reply_opening(
                self.model, self.processor, self.request.prompt, self.cache, self.length, self.is_over
            )
            self.segments.insert(0, opening)
        while any(isinstance(segment, Gap) for segment in self.segments):
            self._fill_canvas()

    def _fill_canvas(self) -> None:
        """Fill the gaps on the next canvas, as far as they lie on it, and make them part of the text.

        A reply is cut into canvases from its first token on, as in training.
        """
        first = next(index for index, segment in enumerate(self.segments) if isinstance(segment, Gap))
        before = [*given_tokens(self.segments[:first]), *self.earlier]
        grid = len(before) // self.length * self.length
        window = open_window(self.segments[first:], before[grid:], self.earlier, self.length, self.ending)
        room = self.options.max_tokens - sum(map(len, self.filled))
        shared = window.sharing(room)
        if shared is None:
            raise Full
        self._encode(before[:grid])
        self.steps.append(0)
        self.best = None
        settling = Settling(
            self.model,
            self.cache,
            self.options,
            shared,
            len(self.steps) - 1,
            self.tries,
            lambda count, best: self._follow(shared, count, best),
        )
        try:
            tries = self._judged(shared, settling.tried())
        except Cancelled:
            if self.best is not None and self.keeps_drafts:
                self._take(first, shared, self._as_it_looks(shared, self.best), is_over=True)
            raise
        best = self.best = tries[0]
        self._draft(shared, best)
        fillings = shared.cut(best.places, best.tokens, self.earlier)
        if sum(len(self._before_end(gap, own)) for gap, own in zip(shared.gaps, fillings, strict=False)) > room:
            raise Full
        text_end = self._take(first, shared, best)
        read = self._read(self.filled)
        self.report(Filled(self.spans - sum(text is None for text in read), self.spans))
        made = len(self.steps) - 1, best.tokens[len(shared.lead) : text_end], self.steps[-1]
        if self.at_once:
            self.unreported = made
        else:
            self._commit(*made)

    def _take(self, first: int, window: Window, best: Try, is_over: bool = False) -> int:
        """Make what fills the gaps of a canvas part of the text; the first of them is the segment `first`. Returns
        where the text on the canvas ends.

        is_over: a gap that goes on beyond the canvas ends with it.
        """
        places, end = best.places, best.layout.end
        spans = window.spans(places)
        fillings = window.cut(places, best.tokens, self.earlier)
        doubts = window.cut(places, best.entropy, self.doubts)
        self.earlier, self.doubts = [], []
        index = first
        for number, (tokens, own) in enumerate(zip(fillings, doubts, strict=True)):
            gap = window.gaps[number]
            kept = self._before_end(gap, tokens)
            is_last = number == len(window.legs)
            ended = len(kept) < len(tokens) or len(kept) == gap.most
            if not is_over and not (ended if is_last else window.is_placed(places, number) or (gap.stop and ended)):
                self.earlier, self.doubts = tokens, own
                break
            if is_last:
                end = min(spans[number][0] + len(kept), end)
            self._settle(index, kept, own)
            index += 1
            anchor = None if is_last or index == len(self.segments) else self.segments[index]
            if isinstance(anchor, Anchor):
                self._settle(index, [] if places[number].start is None else list(anchor.tokens), [])
            index += anchor is not None and not isinstance(anchor, Gap)
        return max(end, len(window.lead))

    def _before_end(self, gap: Gap, tokens: list[int]) -> list[int]:
        """What of `tokens` fills a gap: at most as many as it takes, up to an end token or what stops it."""
        ends = (at for at, token in enumerate(tokens) if token in self.options.end_tokens)
        kept = tokens[: min(next(ends, gap.most), gap.most)]
        text = self.processor.draft_text(kept)
        wanted = len(before_stop(text, gap.stop))
        if wanted < len(text):
            counts = range(len(kept) + 1)
            kept = kept[: next(count for count in counts if len(self.processor.draft_text(kept[:count])) >= wanted)]
        return kept

    def _settle(self, index: int, tokens: list[int], entropies: list[float]) -> None:
        self.segments[index] = tokens
        self.filled.append(tokens)
        self.entropies.append(entropies[: len(tokens)])

    def _follow(self, window: Window, count: int, best: Try) -> None:
        """Take in a step of the canvas at work."""
        self.steps[-1] = count
        self.best = best
        self._draft(window, best)
        self._check_cancelled()

    def _judged(self, window: Window, tries: list[Try]) -> list[Try]:
        """The tries, the least surprising first; the likelier one at first, where nothing tells them apart."""
        tries = sorted(tries, key=lambda each: -each.evidence)
        legs = min(window.comparable(each.places) for each in tries)
        found: list[float | None] = [None] * len(tries)
        if len(tries) > 1 and legs:
            rows = [window.filled(each.places, each.tokens, legs) for each in tries]
            values = surprises(self.model, self.cache, rows, self.options.seed, self.is_over)
            judged = sorted(zip(values, range(len(tries)), strict=True))
            found = [value for value, _ in judged]
            tries = [tries[number] for _, number in judged]
            self.rivals = [
                (window.cut(each.places, each.tokens, self.earlier), value)
                for each, (value, _) in zip(tries, judged, strict=True)
            ]
        number = len(self.steps) - 1
        lengths = ((each.layout.lengths, each.evidence) for each in tries)
        self.attempts += [Attempt(number, *own, value) for own, value in zip(lengths, found, strict=True)]
        return tries

    def _as_it_looks(self, window: Window, best: Try) -> Try:
        """The same with all texts where they look best."""
        if best.seen is None or window.is_whole(best.places):
            return best
        return replace(best, places=best.seen.places, layout=window.lay_out(best.seen.places))

    def _commit(self, canvas: int, tokens: list[int], steps: int, is_over: bool = False) -> None:
        """Report the text that has become certain; when all is over, that is everything."""
        text = self.text if is_over else self._certain_text()
        new, self.reported = text[self.reported :], len(text)
        if new or tokens:
            self.report(Commit(canvas, tokens, [("text", new)] * bool(new), steps))

    def _certain_text(self) -> str:
        """The text that no gap still open can change."""
        texts = list(itertools.takewhile(lambda text: text is not None, self._read(self.filled)))
        return "" if self.at_once and len(texts) < len(self.pieces) else "".join(text for text in texts if text)

    def _read(self, filled: Sequence[list[int]]) -> list[str | None]:
        """The pieces of the text; None for one of whose gaps and anchors some are not among those that are filled."""
        texts: list[str | None] = []
        at = 0
        for piece in self.pieces:
            if isinstance(piece, str):
                texts.append(piece)
                continue
            own = filled[at : at + piece.count]
            at += piece.count
            is_filled = len(own) == piece.count
            texts.append(piece.read([token for tokens in own for token in tokens]) if is_filled else None)
        return texts

    def _draft(self, window: Window, best: Try) -> None:
        """Report a step of a canvas, or one that was not denoised, from where its text is not certain yet; the same
        draft once only.
        """
        looks, lead, step = self._as_it_looks(window, best), len(window.lead), best.step
        tokens, layout = looks.tokens, looks.layout
        accepted = [True] * len(tokens) if step is None else step.accepted
        settled = [a or pinned for a, pinned in zip(accepted, layout.canvas.pinned, strict=True)]
        pieces = self.processor.token_texts(tokens[lead : layout.end])
        draft = Draft(
            canvas=len(self.steps) - 1,
            step=1 if step is None else step.number,
            max_steps=self.options.max_steps,
            tokens=tokens[lead:],
            accepted=settled[lead:],
            entropy=looks.entropy[lead:],
            text="".join(pieces),
            parts=[("text", "".join(pieces))],
            pieces=pieces + [""] * (len(tokens) - layout.end),
            holes=[(start - lead, stop - lead) for start, stop in layout.gaps],
        )
        if draft != self.drafted:
            self.drafted = draft
            self.report(draft)
