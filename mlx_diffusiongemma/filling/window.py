"""Laying a text with gaps on a canvas, whichever places its parts turn out to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from ..generation.canvas import Canvas
from .denoisers import Allowed
from .gaps import Anchor, Gap, Segment, tokens_of
from .places import Leg, Place
from .scoring import FilledCanvas

T = TypeVar("T")


class GappedCanvas(NamedTuple):
    """A canvas on which text and gaps lie.

    gaps: the first position of each gap and the one after its last, as far as they are known. fixed: those that one of
    the gap's options fills. end: after the last token of the text and the first one of its ending; the rest is no part
    of it.
    """

    canvas: Canvas
    allowed: tuple[Allowed, ...]
    gaps: tuple[tuple[int, int], ...]
    fixed: tuple[bool, ...]
    end: int

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.gaps)

    def over(self, tokens: Sequence[int]) -> list[int]:
        """The tokens of a step, with the text written over them."""
        own = zip(self.canvas.tokens, self.canvas.pinned, tokens, strict=True)
        return [given if pinned and given is not None else token for given, pinned, token in own]

    def beginning_with(self, tokens: Sequence[int]) -> GappedCanvas:
        """The same canvas, which begins with these tokens instead of noise."""
        return self._replace(canvas=Canvas(self.over(tokens), self.canvas.pinned))


@dataclass(frozen=True)
class Window:
    """All that may lie on one canvas of `length`: `lead`, pinned, then gaps and texts.

    earlier: the tokens of the first gap that lie on canvases before. last: a gap behind all text. end: the tokens of
    the last leg's text up to the end of the whole text and the first of its ending, where that is among the legs.
    """

    length: int
    lead: list[int]
    earlier: list[int]
    legs: list[Leg]
    last: Gap | None
    end: int | None

    @property
    def start(self) -> int:
        """Where the first gap begins; before 0 where that is on an earlier canvas."""
        return len(self.lead) - len(self.earlier)

    @property
    def gaps(self) -> list[Gap]:
        return [*(leg.gap for leg in self.legs), *([] if self.last is None else [self.last])]

    def sharing(self, room: int) -> Window | None:
        """The same with at most `room` tokens in all gaps: where they may take more, each gets its share. None where
        even the least that they take is more. What is held between anchors shares nothing.
        """
        least, most = sum(gap.least for gap in self.gaps), sum(gap.most for gap in self.gaps)
        if least > room:
            return None
        if most <= room or any(leg.bears is not None for leg in self.legs):
            return self
        gaps = [gap.within(max(gap.least, room * gap.most // most)) for gap in self.gaps]
        legs = [leg._replace(gap=gap) for leg, gap in zip(self.legs, gaps, strict=False)]
        return replace(self, legs=legs, last=None if self.last is None else gaps[-1])

    def settled(self) -> tuple[Place, ...]:
        """The places that are known before anything is computed: those of texts after gaps of one length."""
        places: list[Place] = []
        at = self.start
        for leg in self.legs:
            if not (leg.gap.is_settled and leg.bears is None) or at >= self.length:
                break
            places.append(Place(min(at + leg.gap.most, self.length)))
            at += leg.gap.most + len(leg.text)
        return tuple(places)

    def spans(self, places: Sequence[Place]) -> list[tuple[int, int]]:
        """The first position of each gap that begins on this canvas, or before, and the one after its last. The last
        of them goes on beyond where its text's place is not known; one whose text is left out has no position.
        """
        spans: list[tuple[int, int]] = []
        at = self.start
        for number, leg in enumerate(self.legs):
            place = places[number] if number < len(places) else Place(self.length)
            if place.start is None:
                spans.append((at, at))
                continue
            spans.append((at, place.start))
            at = place.start + len(leg.text)
            if at >= self.length:
                return spans
        return spans if self.last is None else [*spans, (at, self.length)]

    def is_placed(self, places: Sequence[Place], number: int) -> bool:
        """Whether a leg's gap is settled on this canvas: whether its text begins here, or is left out."""
        return number < len(places) and places[number].start != self.length

    def cut(self, places: Sequence[Place], values: Sequence[T], earlier: Sequence[T]) -> list[list[T]]:
        """Values of a canvas's positions, gap by gap. earlier: those of the first gap's tokens on canvases before."""
        own = [*earlier, *values[len(self.lead) :]]
        return [own[start - self.start : stop - self.start] for start, stop in self.spans(places)]

    def comparable(self, places: Sequence[Place]) -> int:
        """The number of legs up to the last one on this canvas whose text may not be left out."""
        own = self.legs[: len(self.spans(places))]
        return max((number for number, leg in enumerate(own, 1) if leg.bears is None), default=0)

    def filled(self, places: Sequence[Place], tokens: list[int], legs: int) -> FilledCanvas:
        """The canvas with these tokens, for a judge: with the texts of its first legs, so many."""
        kept, gaps, fixed = tokens, [], []
        for leg, place, (start, stop) in zip(self.legs[:legs], places, self.spans(places), strict=False):
            if place.start is None:
                continue
            text = leg.text[: self.end] if leg is self.legs[-1] else leg.text
            kept = [*tokens[: max(stop, 0)], *text[max(-stop, 0) :]]
            gaps.append((max(start, 0), max(stop, 0)))
            fixed.append(bool(leg.gap.options))
        return FilledCanvas(tokens, kept, gaps, fixed)

    def is_whole(self, places: Sequence[Place]) -> bool:
        """Whether `places` leave no text to be placed on this canvas."""
        return min(len(self.spans(places)), len(self.legs)) <= len(places)

    def lay_out(self, places: Sequence[Place], drafted: int = 0) -> GappedCanvas:
        """Lay out the texts whose places are known; all behind them is open.

        drafted: so many gaps have been started from their drafts already.
        """
        tokens: list[int | None] = [*self.lead, *[None] * (self.length - len(self.lead))]
        pinned = [position < len(self.lead) for position in range(self.length)]
        allowed: list[Allowed] = [None] * self.length

        def write(first: int, text: Sequence[int], keep: bool) -> None:
            for position in range(max(first, 0), min(first + len(text), self.length)):
                tokens[position], pinned[position] = text[position - first], keep

        spans, gaps, end = self.spans(places), self.gaps, self.length
        for number, (start, stop) in enumerate(spans):
            gap, known = gaps[number], number < len(places)
            if known and places[number].start is None:
                continue
            if known and gap.options:
                write(start, gap.options[places[number].option], True)
            elif number >= drafted:
                write(start, gap.draft[: stop - start], False)
            if known:
                allowed[max(start, 0) : max(stop, 0)] = gap.allowed(stop - start)[max(-start, 0) :][: self.length]
                write(stop, self.legs[number].text, True)
            if known and number == len(self.legs) - 1 and self.end is not None:
                end = min(stop + self.end, self.length)
        own = [(max(a, 0), max(b, 0)) for number, (a, b) in enumerate(spans) if not self._is_left_out(number, places)]
        fixed = [
            bool(gaps[number].options) and number < len(places)
            for number in range(len(spans))
            if not self._is_left_out(number, places)
        ]
        return GappedCanvas(Canvas(tokens, pinned), tuple(allowed), tuple(own), tuple(fixed), end)

    def _is_left_out(self, number: int, places: Sequence[Place]) -> bool:
        return number < len(places) and places[number].start is None


def open_window(
    segments: Sequence[Segment], lead: list[int], earlier: list[int], length: int, ending: Sequence[int] | None
) -> Window:
    """Collect from `segments`, of which the first is a gap, what may lie on a canvas behind `lead`.

    ending: what follows the last segment; its last token fills the canvas up. None: that is left to the model.
    """
    at = len(lead) - len(earlier)
    most = length - min(at, 0)  # tokens of a text that can matter here
    legs: list[Leg] = []
    gap: Gap | None = None
    for segment in segments:
        if gap is not None and isinstance(segment, Gap):
            legs.append(Leg(gap, []))
            gap = None
        if gap is None and at >= length:
            return Window(length, lead, earlier, legs, None, None)
        if isinstance(segment, Gap):
            gap, at = segment, at + segment.least
        elif gap is not None:
            legs.append(Leg(gap, list(tokens_of(segment))[:most], _bears(segment)))
            gap, at = None, at + len(legs[-1].text) * (legs[-1].bears is None)
    if ending is None:
        return Window(length, lead, earlier, legs, gap, None)
    last = Leg(gap, []) if gap is not None else legs.pop()
    filled = [*last.text, *ending, *[ending[-1]] * length]
    return Window(length, lead, earlier, [*legs, last._replace(text=filled[:most])], None, len(last.text) + 1)


def _bears(segment: list[int] | Anchor) -> float | None:
    return None if isinstance(segment, list) else segment.bears
