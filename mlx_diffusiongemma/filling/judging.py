"""Which of several fillings surprises the model least: it reads them on, or looks at their canvases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from .scoring import POSITIONS, Cancelled, Probe, log_probabilities, log_softmax_at, noise_canvases

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma

NEIGHBOURS = 4  # tokens after a gap that tell best whether its length is right


class FilledCanvas(NamedTuple):
    """A canvas that is filled. text: its tokens up to where the text ends that all compared ones have in common, with
    what of it lies beyond the canvas. gaps: the first position of each and the one after its last; fixed: those whose
    filling was given.
    """

    canvas: list[int]
    text: list[int]
    gaps: Sequence[tuple[int, int]]
    fixed: Sequence[bool]


def surprises(
    model: DiffusionGemma, cache: Cache, rows: Sequence[FilledCanvas], seed: int, cancelled: Callable[[], bool]
) -> list[float]:
    """The surprise of each of `rows` to the model, in nats; they follow the cached prefix. Raises Cancelled.

    The encoder's is exact, and costs no more than reading the text. Some checkpoints' encoders never learnt to predict:
    where the text that was given surprises it more than a guess among the square root of all tokens would, the denoiser
    is asked.
    """
    read = [read_on(model, cache, row.text, cancelled) for row in rows]
    given = [value for row, values in zip(rows, read, strict=True) for value in _given(row, values)]
    if given and sum(given) / len(given) > -math.log(model.config.text.vocab_size) / 2:
        return [-sum(values[row.gaps[0][0] :]) for row, values in zip(rows, read, strict=True)]
    return look_at(model, cache, rows, seed, cancelled)


def _given(row: FilledCanvas, values: Sequence[float]) -> list[float]:
    inside = {place for span in row.gaps for place in range(*span)}
    return [value for place, value in enumerate(values) if place not in inside]


def read_on(
    model: DiffusionGemma, cache: Cache, text: Sequence[int], cancelled: Callable[[], bool] = lambda: False
) -> list[float]:
    """The log probability of each token of `text` after the cached prefix and the tokens before it, in nats: what the
    encoder, a language model, predicts. Raises Cancelled.
    """
    if cancelled():
        raise Cancelled
    before = cache.fork()
    last = cache.labels[-1]
    known = isinstance(last, int)  # not so where the prompt ends with an image: its first token is then not asked for
    if known:
        before.trim(1)
    hidden = model.encode(mx.array([[*([last] if known else []), *text[:-1]]]), before)[0]
    asked = text if known else text[1:]
    values: list[float] = [] if known else [0.0]
    for first in range(0, len(asked), POSITIONS):
        logits = model.logits(hidden[None, first : first + POSITIONS])[0]
        values += np.array(log_softmax_at(logits, mx.array(list(asked[first : first + POSITIONS])))).tolist()
    return values


def look_at(
    model: DiffusionGemma,
    cache: Cache,
    rows: Sequence[FilledCanvas],
    seed: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[float]:
    """The surprise of each row to the denoiser, in nats: minus the log probability of every token from the first gap up
    to where the text ends on all of the canvases, each with all others in place. Raises Cancelled.

    A token that is seen in its place is nearly always believed, right or wrong. So noise takes the place of those
    that the model did not write and that must fit what it wrote: of the NEIGHBOURS tokens after a gap, all at once,
    and of what was given for a gap, one at a time.
    """
    [noise] = noise_canvases(seed, 1, len(rows[0].canvas), model.config.text.vocab_size)
    common = min(min(len(row.text), len(row.canvas)) - row.gaps[-1][1] for row in rows)
    probes: list[list[Probe]] = []
    for row in rows:
        inside = {place for span in row.gaps for place in range(*span)}
        left_out: dict[int, set[int]] = {}  # for a place, those with noise while it is asked for
        for (start, stop), fixed in zip(row.gaps, row.fixed, strict=True):
            left_out |= {place: {place} for place in range(start, stop) if fixed}
            after = set(range(stop, min(stop + NEIGHBOURS, len(row.text), len(row.canvas)))) - inside
            left_out |= dict.fromkeys(after, after)
        places = range(row.gaps[0][0], row.gaps[-1][1] + common)
        probes.append([probe(row.canvas, place, left_out.get(place, set()), noise) for place in places])
    values = iter(log_probabilities(model, cache, list(itertools.chain.from_iterable(probes)), cancelled))
    return [-sum(itertools.islice(values, len(own))) for own in probes]


def probe(canvas: Sequence[int], place: int, left_out: Collection[int], noise: Sequence[int]) -> Probe:
    """Asks for the token at `place`, with noise at the places that are left out."""
    seen = tuple(noise[at] if at in left_out else token for at, token in enumerate(canvas))
    return Probe(seen, place, canvas[place])
