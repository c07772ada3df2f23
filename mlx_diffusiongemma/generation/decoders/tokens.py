"""The choice of a causal decoder's next token: as mlx-lm's sampler makes it, with draws that depend on the reply."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

if TYPE_CHECKING:
    from ...options import Settings

TOKEN, KEPT, REPLACED = 0, 1, 2  # what a key is for: to choose a token, to keep a drafted one or to replace it
REMEMBERED = 20  # tokens that a repetition penalty looks back at: mlx-lm's own number
CHUNK = 256  # of the vocabulary: the best of it are looked for among the chunks with the highest maxima


class Candidates(NamedTuple):
    """The tokens that may come next, at every position: `ids` and their `log_probabilities`, [..., K], likeliest first.

    Those that the filters leave out have a log probability of -inf; the others' probabilities sum up to 1.
    """

    ids: mx.array
    log_probabilities: mx.array

    def log_probability_of(self, tokens: mx.array) -> mx.array:
        """The log probabilities [...] of `tokens` [...]: -inf for those that are not among the candidates."""
        return mx.where(self.ids == tokens[..., None], self.log_probabilities, -mx.inf).max(axis=-1)

    def draw(self, keys: mx.array) -> mx.array:
        """Draw a token for each row of [B, K], with a PRNG key for each [B, 2]: [B]."""
        chosen = [mx.random.categorical(row, key=key) for row, key in zip(self.log_probabilities, keys, strict=True)]
        return mx.take_along_axis(self.ids, mx.stack(chosen)[:, None], axis=-1)[:, 0]


def candidates(logits: mx.array, options: Settings) -> Candidates:
    """The distribution from which mlx-lm's `make_sampler` draws with these options, for logits [..., V].

    Its filters look at probabilities before the temperature: top-p, then min-p, then top-k. What each keeps can be
    read off the `top_k` likeliest tokens, so no array of the vocabulary is sorted. temperature must be above 0.
    """
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    ids, values = _likeliest(logits, options.top_k)
    values = values - total
    if options.top_p < 1:
        probabilities = mx.exp(values)
        above = mx.cumsum(probabilities, axis=-1) - probabilities
        values = mx.where((above < options.top_p) | (mx.arange(ids.shape[-1]) == 0), values, -mx.inf)
    if options.min_p > 0:
        values = mx.where(values < values[..., :1] + math.log(options.min_p), -mx.inf, values)
    scaled = values / options.temperature
    return Candidates(ids, scaled - mx.logsumexp(scaled, axis=-1, keepdims=True))


def _likeliest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The ids of the `count` highest logits [..., V] and those logits, in descending order; 0: all of them."""
    vocabulary = logits.shape[-1]
    if 0 < count < vocabulary // CHUNK:
        # The `count` highest are in the `count` chunks whose maxima are highest: a sort of the whole takes far longer.
        padded = mx.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, -vocabulary % CHUNK)], constant_values=-mx.inf)
        chunks = padded.reshape(*logits.shape[:-1], -1, CHUNK)
        best = mx.argpartition(-chunks.max(axis=-1), kth=count - 1, axis=-1)[..., :count]
        values = mx.take_along_axis(chunks, best[..., None], axis=-2).flatten(-2)
        ids = (best[..., None] * CHUNK + mx.arange(CHUNK)).flatten(-2)
    else:
        values, ids = logits, mx.broadcast_to(mx.arange(vocabulary), logits.shape)
    if 0 < count < values.shape[-1]:
        part = mx.argpartition(-values, kth=count - 1, axis=-1)[..., :count]
        values, ids = mx.take_along_axis(values, part, axis=-1), mx.take_along_axis(ids, part, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(values, order, axis=-1)


def choose_tokens(logits: mx.array, options: Settings, keys: mx.array) -> mx.array:
    """The next token of each row of logits [B, V], with a PRNG key for each [B, 2]: [B]."""
    if options.temperature == 0:
        return logits.argmax(axis=-1)
    return candidates(logits, options).draw(keys)


def penalized(logits: mx.array, options: Settings, before: Iterable[mx.array]) -> mx.array:
    """Logits [N, V] after the repetition penalty, if there is one, for the tokens `before` each of them, the last
    REMEMBERED at most, which may be lazy.
    """
    if options.repetition_penalty == 1:
        return logits
    [process] = make_logits_processors(repetition_penalty=options.repetition_penalty)
    return mx.concatenate([process(own, row[None]) for row, own in zip(logits, before, strict=True)])


def token_keys(seeds: Sequence[int], places: Sequence[int], purpose: int) -> mx.array:
    """A PRNG key per row, [B, 2] uint32, for the draw that finds the token at its place in the reply."""
    digests = (
        hashlib.blake2b(struct.pack("<Q2I", seed, place, purpose), digest_size=8, person=b"token").digest()
        for seed, place in zip(seeds, places, strict=True)
    )
    return mx.array([struct.unpack("<2I", digest) for digest in digests], mx.uint32)
