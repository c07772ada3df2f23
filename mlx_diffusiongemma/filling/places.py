"""Where on a canvas the text after a gap belongs, read off a step instead of tried: one forward pass says for every
place how much likelier the text is there than by chance.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..model import vocabulary
from .gaps import Gap

if TYPE_CHECKING:
    from ..generation.denoising import Job
    from ..model.diffusion_gemma import DiffusionGemma
    from ..model.vocabulary import Reading

COMMON = 0.05  # of the probability by chance: that of any token, so that no token is infinitely surprising
BEYOND = 4.0  # nats of evidence that a text needs to lie on a canvas where it may also lie beyond it


class Leg(NamedTuple):
    """A gap, and the text that follows it. bears: None where the text must be kept; else it may be left out, and must
    be where one of its tokens is by so many nats less likely than another.
    """

    gap: Gap
    text: list[int]
    bears: float | None = None


class Place(NamedTuple):
    """Where a leg's text begins on the canvas, and which of the gap's options fills it. start: before 0 where it lies
    on earlier canvases in part; the canvas's length where it lies beyond; None where it is left out.
    """

    start: int | None
    option: int = 0


@dataclass(frozen=True)
class Ranked:
    """Places for the legs of a canvas, and the evidence for them: nats by which they are likelier than chance."""

    places: tuple[Place, ...]
    evidence: float


class Watch:
    """Notes at every step how much likelier given tokens are at every position of a canvas than by chance, in nats.

    By chance is what the open positions make of a token on average: where the model is undecided, nothing speaks for
    or against a place; where it is sure of something else, much speaks against it. Only the logits of these tokens are
    computed; their normaliser comes from the pass over the vocabulary that the step makes anyway.
    """

    def __init__(self, model: DiffusionGemma, texts: Sequence[Sequence[int]]) -> None:
        self.ids = sorted({token for text in texts for token in text})
        self.column = {token: number for number, token in enumerate(self.ids)}
        self.embedding = model.model.decoder.embed_tokens
        self.rows = vocabulary.embedding_rows(self.embedding, mx.array(self.ids))
        self.cap, self.vocabulary = model.config.text.final_logit_softcapping, model.config.text.vocab_size

    def note(self, reading: Reading, hidden: mx.array, temperature: float | mx.array, jobs: Sequence[Job]) -> mx.array:
        """The notes of a step, [B, 2 L ids] float32: beside the evidence, the nats by which the likeliest token of each
        position is likelier.
        """
        assert reading.log_total is not None  # a pass over the whole vocabulary knows it
        heat = mx.array(temperature).reshape(-1, 1, 1)
        found = vocabulary.logits(self.rows, hidden, self.cap) / heat - reading.log_total[..., None]
        opened = ~mx.array([job.canvas.pinned for job in jobs])[..., None]
        count = mx.maximum(opened.sum(axis=1, keepdims=True), 1)
        mean = mx.where(opened, mx.exp(found), 0).sum(axis=1, keepdims=True) / count
        chance = mx.log((1 - COMMON) * mean + COMMON / self.vocabulary)
        product = (self.embedding(reading.tokens) * hidden).sum(axis=-1, keepdims=True).astype(mx.float32)
        peak = mx.tanh(product / self.cap) * self.cap / heat - reading.log_total[..., None]
        return mx.concatenate([(found - chance).reshape(len(jobs), -1), (peak - found).reshape(len(jobs), -1)], axis=1)

    def along(
        self, notes: np.ndarray, text: Sequence[int], earlier: Sequence[int], bears: float | None = None
    ) -> np.ndarray:
        """Evidence for `text` at each place from -len(earlier) to the canvas's length L, [len(earlier) + L + 1].

        earlier: the tokens before the canvas: a text that begins there must be these, and go on here; what it has of
        them is as likely as tokens on the canvas get. What would lie behind the canvas says nothing. bears: see `Leg`.
        """
        evidence, short = notes.reshape(2, -1, len(self.ids))
        before, columns = len(earlier), [self.column[token] for token in text]
        total = _along(evidence, columns, before, evidence.max(axis=0))
        if bears is not None:
            total[_along(short > bears, columns, before, 0) > 0] = -np.inf
        for place in range(before):
            if list(earlier[place:]) != list(text[: before - place]):
                total[place] = -np.inf
        total[-1] = 0.0
        return total

    def against(self, notes: np.ndarray, text: Sequence[int], place: int) -> float:
        """By how many nats the model would rather have another token at one of a text's positions: the most."""
        _, short = notes.reshape(2, -1, len(self.ids))
        shown = text[max(-place, 0) : max(len(short) - place, 0)]
        first = max(place, 0)
        return max((short[first + at, self.column[token]] for at, token in enumerate(shown)), default=0.0)


def _along(by_position: np.ndarray, columns: Sequence[int], before: int, earlier: np.ndarray | int) -> np.ndarray:
    """The sum over a text's tokens of what [L, ids] says of each in its place, for each place of the text."""
    length = len(by_position)
    padded = np.zeros((before + 2 * length + len(columns), by_position.shape[1]))
    padded[:before] = earlier
    padded[before : before + length] = by_position
    total = np.zeros(before + length + 1)
    for offset, column in enumerate(columns):
        total += padded[offset : offset + len(total), column]
    return total


@dataclass(frozen=True)
class Evidence:
    """The evidence of a step for the texts of `legs` on a canvas of `length`.

    start: of the first gap; before 0 where it began on an earlier canvas. fits: for each leg its text's evidence at
    each place from min(start, 0) to `length`, -inf where it cannot be. options: likewise that of each of the gap's.
    goes_on: whether text may lie beyond the canvas.
    """

    legs: Sequence[Leg]
    start: int
    length: int
    fits: Sequence[np.ndarray]
    options: Sequence[Sequence[np.ndarray]]
    goes_on: bool

    def rank(self, wanted: int) -> list[Ranked]:
        """The best places, then rivals, the best first: for each text, as many as are `wanted`, each the best of those
        that put it where none before did or fill its gap otherwise. Nothing where the texts do not fit the canvas.
        """
        best = self._best(())
        if best is None:
            return []
        rivals: list[Ranked] = []
        for number, place in enumerate(best.places):
            banned = {(number, place)}
            for _ in range(wanted):
                rival = self._best(banned)
                if rival is None:
                    break
                banned.add((number, rival.places[number]))
                if rival not in rivals:
                    rivals.append(rival)
        return [best, *sorted(rivals, key=lambda rival: -rival.evidence)]

    def _best(self, banned: Collection[tuple[int, Place]]) -> Ranked | None:
        """The places with the most evidence without one that is banned: dynamic programming over where each text ends.

        All indices count from `low`, the first place there is; the last is beyond the canvas.
        """
        low = min(self.start, 0)
        count = self.length - low + 1
        value = np.full(count, -np.inf)  # of the best way to have come to each place
        value[self.start - low] = 0.0
        ways: list[_Ways] = []
        for number, leg in enumerate(self.legs):
            forbidden = [place for leg_number, place in banned if leg_number == number]
            arrivals = _arrivals(leg.gap, value, self.options[number], self.goes_on, forbidden, low)
            value, way = _ends(leg, arrivals, value, self.fits[number], Place(None) in forbidden)
            ways.append(way)
        end = int(value.argmax())
        if value[end] == -np.inf:
            return None
        evidence, places = float(value[end]), []
        for way in reversed(ways):
            place = int(way.place[end])
            if place < 0:
                places.append(Place(None))
                continue
            places.append(Place(place + low, int(way.option[place])))
            end = int(way.origin[place])
        return Ranked(tuple(reversed(places)), evidence)


class _Arrivals(NamedTuple):
    """For each place: the best value of getting there over a gap, from where, and with which of its options."""

    value: np.ndarray
    origin: np.ndarray
    option: np.ndarray


class _Ways(NamedTuple):
    """For each end of a leg the place of its text, -1 where it is left out; and for each place, see `_Arrivals`."""

    place: np.ndarray
    origin: np.ndarray
    option: np.ndarray


def _arrivals(
    gap: Gap, value: np.ndarray, options: Sequence[np.ndarray], goes_on: bool, forbidden: Collection[Place], low: int
) -> _Arrivals:
    """The ways over a gap, to any place but those that are forbidden."""
    count = len(value)
    beyond, index = count - 1, np.arange(count)
    found = _Arrivals(np.full(count, -np.inf), np.zeros(count, int), np.zeros(count, int))

    def offer(first: int, values: np.ndarray, origins: np.ndarray, option: int) -> None:
        places = index[first : first + len(values)]
        barred = [place.start - low for place in forbidden if place.start is not None and place.option == option]
        better = (values > found.value[places]) & ~np.isin(places, barred)
        for array, new in zip(found, (values, origins, np.full(len(places), option)), strict=True):
            array[places[better]] = new[better]

    def offer_beyond(values: np.ndarray, reach: int, option: int) -> None:
        may = (index == beyond) | ((index + reach >= beyond) & goes_on)
        origin = int(np.where(may, values, -np.inf).argmax())
        offer(beyond, values[origin : origin + may[origin]], index[origin : origin + 1], option)

    for option, tokens in enumerate(gap.options):
        values, reach = value + options[option], max(beyond - len(tokens), 0)
        offer(len(tokens), values[:reach], index[:reach], option)
        offer_beyond(values, len(tokens), option)
    if not gap.options and gap.least < beyond:
        most = min(gap.most, beyond)
        before = np.concatenate([np.full(most, -np.inf), value[:beyond]])
        windows = np.lib.stride_tricks.sliding_window_view(before, most - gap.least + 1)[:beyond, ::-1]
        length = windows.argmax(axis=1)  # beyond the least; the shorter where two are as good
        offer(0, windows[index[:beyond], length], index[:beyond] - gap.least - length, 0)
    if not gap.options:
        offer_beyond(value + np.where(index < beyond, BEYOND, 0.0), gap.most, 0)
    return found


def _ends(
    leg: Leg, arrivals: _Arrivals, value: np.ndarray, fit: np.ndarray, must_keep: bool
) -> tuple[np.ndarray, _Ways]:
    """The values of the ends of a leg's text, and how to come there."""
    count = len(value)
    beyond = count - 1
    placed = arrivals.value + fit
    ends = np.minimum(np.arange(count) + len(leg.text), beyond)
    new, place = np.full(count, -np.inf), np.full(count, -1)
    inside = ends < beyond
    new[ends[inside]], place[ends[inside]] = placed[inside], np.arange(count)[inside]
    last = int(np.where(inside, -np.inf, placed).argmax())
    new[beyond], place[beyond] = placed[last] if not inside[last] else -np.inf, last
    if leg.bears is not None and not must_keep:
        better = value > new
        new, place = np.where(better, value, new), np.where(better, -1, place)
    return new, _Ways(place, arrivals.origin, arrivals.option)
