"""Scores: how probable given tokens are at given places of a canvas, and what follows from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..checkpoints.accounting import rows_after
from ..generation import sampling

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor, Prompt

ROWS = 8  # canvases in one forward pass
POSITIONS = 32  # of which the logits over the whole vocabulary exist at once
NEIGHBOURS = 4  # tokens after a gap that tell best whether its length is right
THOUGHT, EMPTY_THOUGHT = "<|channel>", "<|channel>thought\n<channel|>"


class Probe(NamedTuple):
    """Asks for the probability of `token` at `position`, given everything on `canvas`, also what is there itself."""

    canvas: tuple[int, ...]
    position: int
    token: int


class Cancelled(Exception):
    """Nobody wants any more what is being computed. Never leaves the request that was cancelled."""


def log_probabilities(
    model: DiffusionGemma, cache: Cache, probes: Sequence[Probe], cancelled: Callable[[], bool] = lambda: False
) -> list[float]:
    """The log probability of each probe's token after the cached prefix (one row), at temperature 1, in nats.

    The canvases have one length. Each different one is computed once, ROWS together or as many as memory allows.
    Raises Cancelled where `cancelled` says so before one of these batches.
    """
    by_canvas: dict[tuple[int, ...], list[Probe]] = {}
    for probe in dict.fromkeys(probes):
        by_canvas.setdefault(probe.canvas, []).append(probe)
    canvases = list(by_canvas)
    found: dict[Probe, float] = {}
    rows = rows_after(cache, ROWS)
    try:
        for start in range(0, len(canvases), rows):
            if cancelled():
                raise Cancelled
            together = canvases[start : start + rows]
            hidden = model.denoise(mx.array(together), cache)
            cache.settle()  # before anything is computed: the canvases are then written in place
            asked = [(row, probe) for row, canvas in enumerate(together) for probe in by_canvas[canvas]]
            found |= _read(model, hidden, asked)
    finally:
        cache.release()
    return [found[probe] for probe in probes]


def _read(model: DiffusionGemma, hidden: mx.array, asked: list[tuple[int, Probe]]) -> dict[Probe, float]:
    """The log probability of each probe's token in its row of hidden [B, L, H]."""
    found: dict[Probe, float] = {}
    for first in range(0, len(asked), POSITIONS):
        few = asked[first : first + POSITIONS]
        at = hidden[mx.array([row for row, _ in few]), mx.array([probe.position for _, probe in few])]
        values = log_softmax_at(model.logits(at[None])[0], mx.array([probe.token for _, probe in few]))
        found |= zip((probe for _, probe in few), np.array(values).tolist(), strict=True)
    return found


def log_softmax_at(logits: mx.array, tokens: mx.array) -> mx.array:
    """Take the log probabilities of tokens [P] from logits [P, V]: [P]."""
    return mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)


def noise_canvases(seed: int, count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Canvases of uniform random ids: the starting canvases that a batch with this seed would have."""
    draws = [sampling.Draws(seed, row) for row in range(count)]
    keys = sampling.draw_keys(draws, [0] * count, sampling.NOISE)
    canvases: list[list[int]] = np.array(sampling.noise(keys, length, vocabulary)).tolist()
    return canvases


def reply_opening(
    model: DiffusionGemma,
    processor: Processor,
    prompt: Prompt,
    cache: Cache,
    length: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[int]:
    """The tokens of an empty thought where a reply to `prompt` (encoded in `cache`) begins with one, else none.

    Nothing in a checkpoint's files tells: some templates end the prompt with the block, some models write it by
    themselves, and others reply at once. So the model is asked: what it puts first on a canvas of noise, of so many
    tokens and the same for all, decides. The cache remembers the answer for this prompt.
    Raises Cancelled, as `log_probabilities`.
    """
    marker = processor.tokenizer.get_vocab().get(THOUGHT)
    block = processor.tokenizer.encode(EMPTY_THOUGHT, add_special_tokens=False)
    if marker is None or prompt.tokens[-len(block) :] == block:
        return []
    asked = length, *cache.labels
    if asked != cache.reply_opening[0]:
        [canvas] = noise_canvases(0, 1, length, model.config.text.vocab_size)
        [value] = log_probabilities(model, cache, [Probe(tuple(canvas), 0, marker)], cancelled)
        cache.reply_opening = asked, value > math.log(0.5)
    return block if cache.reply_opening[1] else []


def log_mean(log_probabilities: Sequence[float]) -> float:
    """The logarithm of the arithmetic mean of probabilities given by their logarithms, however small they are."""
    top = max(log_probabilities)
    return top + math.log(sum(math.exp(value - top) for value in log_probabilities) / len(log_probabilities))


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
