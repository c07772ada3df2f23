"""Denoising that computes only the rows of a canvas that have not settled: mode `turbo`, which is approximate.

A row is one position of the canvas in one step. Once a row is settled, its keys, values, entropy and sample stay those
of the last step that computed it; the others are computed, attend to the whole canvas and are read against the
vocabulary. Acceptance and stopping go on over all rows as ever.

On a small checkpoint trained for 12.3 steps a canvas, 300 prompts with 5 seeds each, a reply's links come out right as
often as in the plain loop (95.3 and 95.1 %; difference +0.18 ± 0.25 points), after 1.01 ± 0.01 times the steps and 0.68
times the rows; 15 % of the replies differ (`tests/benchmarks/active_rows.py`). A canvas that is done after two or three
steps gains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Protocol, overload

import mlx.core as mx
import numpy as np

from ...model.vocabulary import Reading
from ..denoising import Denoiser, Denoising, Job, State

if TYPE_CHECKING:
    from ...model.cache import Cache, CacheRows
    from ...model.layer_cache import Places
    from ...options import Settings

# Chosen on prompts of their own, apart from those that the benchmark measures.
HELD = 2  # steps for which a settled row's token was accepted and is the same: its keys and values are of that token
SURE = 1e-4  # nats that a settled row's entropy is below
NEAR = 2  # positions around a token that changes whose rows are computed
WHOLE_FIRST = 2  # steps of a canvas that compute all rows
WHOLE_EVERY = 8  # and after them, one step in so many
NEARLY = 2  # all rows are computed once the mean entropy is below so many times that which stops a canvas
SIXTEENTHS = (1, 2, 3, 4, 6, 8, 10, 12)  # of a canvas's rows: the sizes of a step, few, so that a GPU's kernels stay


class PartDenoiser(Denoiser, Protocol):
    """The part of a model that is called: see `model.diffusion_gemma.DiffusionGemma`."""

    def denoise(
        self,
        canvas: mx.array,
        cache: Cache | CacheRows,
        self_conditioning: mx.array | None,
        places: Places | None = None,
    ) -> mx.array: ...

    def read_vocabulary(
        self,
        hidden: mx.array,
        temperature: float | mx.array,
        key: mx.array | None,
        places: Places | None = None,
    ) -> Reading: ...


class ActiveRows(Denoising):
    """Denoises canvases of which each computes the rows that it needs, in one of a few sizes; room that is left in a
    size refreshes the rows that were computed the longest ago. Only a step of all rows ends a canvas.

    Which rows these are depends on the canvas alone. Canvases of a batch are computed in the size of the largest, where
    the others repeat a row of theirs, so a text does not change with its company.

    In a state: held [B, L] is for how many computed steps in a row a token was accepted and the same, computed [B, L]
    the last step that computed each row, order [B, L] the rows of the next step and size [B] how many these are, all
    others a repetition.
    """

    def __init__(self, model: PartDenoiser, options: Settings, vocabulary: int) -> None:
        super().__init__(model, options, vocabulary)
        self._model = model
        self._size: int | None = None  # rows per canvas of the graph to build; None: all

    def drop(self, leaving: Sequence[Job]) -> None:
        super().drop(leaving)
        if self._pending is None:
            self._size = None  # the next canvas begins with all rows

    def _newcomers(self) -> list[State]:
        return [self._all_open(state) for state in super()._newcomers()]

    def _all_open(self, state: State) -> State:
        none, shape = mx.zeros(state.canvas.shape, mx.int32), state.canvas.shape
        order, size = mx.broadcast_to(mx.arange(shape[1]), shape), mx.full(shape[:1], shape[1])
        entropy = mx.zeros(shape)
        return state._replace(sample=none, entropy=entropy, held=none, computed=none, order=order, size=size)

    def _suits(self, report: np.ndarray, newcomers: list[State]) -> bool:
        built, length = self._size, report.shape[1] // 3
        sizes = report[:, -1].tolist() + [length for state in newcomers for _ in state.jobs]
        self._size = max(sizes) if any(size < length for size in sizes) else None
        return built == self._size

    def _read(
        self, state: State, cache: Cache | CacheRows, temperature: float | mx.array, keys: mx.array | None
    ) -> tuple[Reading, mx.array | None]:
        if self._size is None:
            return super()._read(state, cache, temperature, keys)
        # A canvas's first step computes all rows, so that there is something of each.
        assert state.order is not None and state.soft_embedding is not None and state.entropy is not None
        index = state.order[:, : self._size]
        places = index, state.canvas.shape[1]
        canvas = mx.take_along_axis(state.canvas, index, axis=1)
        soft = mx.take_along_axis(state.soft_embedding, index[..., None], axis=1)
        hidden = self._model.denoise(canvas, cache, soft, places)
        new = self._model.read_vocabulary(hidden, temperature, keys, places)
        reading = Reading(
            _renewed(state.tokens, new.tokens, index),
            _renewed(state.sample, new.sample, index),
            _renewed(state.entropy, new.entropy, index),
            _renewed(state.soft_embedding, new.soft_embedding, index),
        )
        return reading, None

    def _planned(
        self, before: State, after: State, accepted: mx.array, mean: mx.array, finished: mx.array
    ) -> tuple[State, mx.array]:
        if after.sample is None:  # the last step: nothing comes after it
            return after, mx.stack([finished, finished], axis=1)
        order, size, held, computed, entropy = before.order, before.size, before.held, before.computed, after.entropy
        assert order is not None and size is not None and held is not None and computed is not None
        assert entropy is not None
        length, steps = after.canvas.shape[1], mx.array(after.numbers)[:, None]
        active = mx.put_along_axis(mx.zeros(order.shape, mx.bool_), order, mx.array(True), axis=1)
        computed = mx.where(active, steps, computed)
        held = mx.where(after.sample == before.canvas, held + active.astype(mx.int32), 1)
        held = mx.where(accepted, held, 0)
        settled = (held >= HELD) & (entropy < SURE) & (after.sample == after.tokens)
        settled = settled & ~_around(after.canvas != before.canvas, NEAR)
        due = mx.array([number < WHOLE_FIRST or (number + 1) % WHOLE_EVERY == 0 for number in after.numbers])
        whole = due | finished | (mean < NEARLY * self.options.confidence)
        following = mx.where(whole, length, _fitting((~settled).sum(axis=1), length))
        after = after._replace(held=held, computed=computed, order=_ordered(settled, computed, following))
        flags = mx.stack([finished & (size == length), following.astype(mx.uint32)], axis=1)
        return after._replace(size=following), flags


def _fitting(needed: mx.array, length: int) -> mx.array:
    """The smallest size of a step of a canvas of `length` that has room for the rows needed, [B]."""
    sizes = mx.array([max(length * part // 16, 1) for part in SIXTEENTHS] + [length])
    return sizes[(needed[:, None] > sizes[:-1]).sum(axis=1)]


def _ordered(settled: mx.array, computed: mx.array, size: mx.array) -> mx.array:
    """The rows of a step [B, L]: all that are not settled, then the stalest; after `size` of them, the first again."""
    places = mx.arange(settled.shape[1])
    order = mx.argsort(mx.where(settled, computed + 1, 0) * settled.shape[1] + places, axis=1)
    return mx.where(places < size[:, None], order, order[:, :1])


@overload
def _renewed(old: mx.array, new: mx.array, index: mx.array) -> mx.array: ...


@overload
def _renewed(old: mx.array | None, new: mx.array | None, index: mx.array) -> mx.array | None: ...


def _renewed(old: mx.array | None, new: mx.array | None, index: mx.array) -> mx.array | None:
    """`old` [B, L, ...] with `new` [B, F, ...] at `index` [B, F]."""
    if old is None or new is None:
        return None
    index = index.reshape(*index.shape, *[1] * (new.ndim - 2))
    return mx.put_along_axis(old, index, new.astype(old.dtype), axis=1)


def _around(marked: mx.array, distance: int) -> mx.array:
    """Where anything is marked [B, L] at most `distance` positions away."""
    length = marked.shape[1]
    padded = mx.pad(marked, [(0, 0), (distance, distance)])
    return reduce(mx.logical_or, [padded[:, shift : shift + length] for shift in range(2 * distance + 1)])
