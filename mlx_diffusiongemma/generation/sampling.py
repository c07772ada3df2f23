"""The sampler: pure functions of arrays, as `EntropyBoundSampler` and `StableAndConfidentStoppingCriteria` define it.

B rows, L canvas positions. `pinned` [B, L] marks positions that never change; None stands for none.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

NOISE, SAMPLE = 0, 1  # what a key is for


class Draws(NamedTuple):
    """Everything that a canvas's random draws depend on, beside the step: so a text does not change with what is
    displayed, batched or cached.

    row: tells canvases apart that one request tries at once. canvas, attempt: both count from 0.
    """

    seed: int
    row: int = 0
    canvas: int = 0
    attempt: int = 0


def seed_of_row(seed: int, index: int) -> int:
    """The seed of a batch's reply number `index`, which alone gives the same text; the first has the batch's own."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(struct.pack("<2Q", seed, index), digest_size=8).digest(), "little")


def temperature(step: int, max_steps: int, t_min: float, t_max: float) -> float:
    """The temperature of a step, counted from 1: it falls linearly from t_max towards t_min, which it never reaches."""
    return t_min + (t_max - t_min) * (max_steps - step + 1) / max_steps


def draw_keys(draws: Sequence[Draws], steps: Sequence[int], purpose: int) -> mx.array:
    """A PRNG key per row, [B, 2] uint32. Step 0 is the starting canvas."""
    digests = (
        hashlib.blake2b(struct.pack("<Q5I", *own, step, purpose), digest_size=8).digest()
        for own, step in zip(draws, steps, strict=True)
    )
    return mx.array([struct.unpack("<2I", digest) for digest in digests], mx.uint32)


def noise(keys: mx.array, length: int, vocabulary: int) -> mx.array:
    """Uniform random ids [B, L], int32, from a key per row."""
    return mx.stack([mx.random.randint(0, vocabulary, (length,), key=key) for key in keys])


def accept(entropy: mx.array, bound: float, pinned: mx.array | None = None) -> mx.array:
    """Mark the free positions that keep their sample, [B, L]: in ascending entropy, while the entropies before one sum
    up to at most `bound` (https://arxiv.org/abs/2505.24857). Pinned positions take nothing of the budget.
    """
    if pinned is not None:
        entropy = mx.where(pinned, 0, entropy)
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    within = mx.cumsum(ascending, axis=-1) - ascending <= bound
    accepted = mx.take_along_axis(within, mx.argsort(order, axis=-1), axis=-1)
    return accepted if pinned is None else accepted & ~pinned


def mean_entropy(entropy: mx.array, pinned: mx.array | None = None) -> mx.array:
    """The mean entropy of each row's free positions, [B]; 0 where there are none."""
    if pinned is None:
        return entropy.mean(axis=-1)
    free = ~pinned
    return mx.where(free, entropy, 0).sum(axis=-1) / mx.maximum(free.sum(axis=-1), 1)


def unchanged_steps(tokens: mx.array, previous: mx.array, before: mx.array) -> mx.array:
    """For how many steps in a row the argmax canvas [B, L] has been the same, [B] int32.

    previous, before: the last step's canvas and count; a first step's are of no token (-1) and 0.
    """
    return mx.where((tokens == previous).all(axis=-1), before + 1, 0)


def finished(unchanged: mx.array, mean: mx.array, stability: int, confidence: float) -> mx.array:
    """Says which rows [B] stop: those stable for `stability` steps and with a mean entropy below `confidence`."""
    return (unchanged >= stability) & (mean < confidence)
