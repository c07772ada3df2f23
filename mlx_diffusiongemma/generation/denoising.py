"""One canvas: the loop over denoising steps, as the reference's `generate` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..options import GenerationOptions
from . import sampling
from .canvas import Canvas


class PrefixCache(Protocol):
    """What the loop needs of a cache: see `model.cache.Cache`."""

    def settle(self) -> None: ...

    def release(self) -> None: ...


class Denoiser(Protocol):
    """What the loop needs of a model: see `model.diffusion_gemma.DiffusionGemma`."""

    def denoise(self, canvas: mx.array, cache: PrefixCache, self_conditioning: mx.array | None) -> mx.array: ...

    def read_vocabulary(self, hidden: mx.array, temperature: float, key: mx.array | None) -> tuple: ...

    def embed(self, tokens: mx.array) -> mx.array: ...


class Step(NamedTuple):
    """What a step shows of each row: argmax tokens, accepted positions, entropies in nats, and whether it is done."""

    number: int
    tokens: list[list[int]]
    accepted: list[list[bool]]
    entropy: list[list[float]]
    finished: list[bool]


class _Pending(NamedTuple):
    """A step's arrays. `report` [B, 3 L + 1] holds all that is read back, so that one read blocks, once."""

    report: mx.array
    tokens: mx.array
    unchanged: mx.array
    finished: mx.array
    canvas: mx.array | None
    soft_embedding: mx.array | None

    def dispatch(self) -> None:
        mx.async_eval([array for array in self if array is not None])


class CanvasRun:
    """A batch of canvases being denoised: B rows of L positions after one cached prefix.

    starts: where each row begins. seed, number, attempt: what the draws depend on, beside row and step.
    settled: rows that are done already and only keep the others company.
    """

    def __init__(
        self,
        model: Denoiser,
        cache: PrefixCache,
        options: GenerationOptions,
        starts: list[Canvas],
        vocabulary: int,
        *,
        seed: int,
        number: int = 0,
        attempt: int = 0,
        settled: list[bool] | None = None,
    ):
        self.model, self.cache, self.options = model, cache, options
        self.vocabulary = vocabulary
        self.rows, self.length = len(starts), len(starts[0].tokens)
        self.draw = (seed, self.rows, number, attempt)
        pinned = mx.array([start.pinned for start in starts])
        self.pinned = pinned if any(any(start.pinned) for start in starts) else None
        self.settled = mx.array(settled or [False] * self.rows)
        self.start = self._starting_canvas(starts)

    def _starting_canvas(self, starts: list[Canvas]) -> mx.array:
        random = self._noise(step=0)
        if all(token is None for start in starts for token in start.tokens):
            return random
        given = mx.array([[-1 if token is None else token for token in start.tokens] for start in starts])
        return mx.where(given < 0, random, given)

    def _noise(self, step: int) -> mx.array:
        return sampling.noise(sampling.draw_keys(*self.draw, step, sampling.NOISE), self.length, self.vocabulary)

    def steps(self) -> Iterator[Step]:
        """Denoise until every row is done or the steps are used up. Closing the iterator frees the canvas.

        While the device computes a step, the next one's graph is built; it is dispatched only once the stop flag has
        been read, and before the caller sees the step.
        """
        try:
            pending = self._step(1, None)
            self.cache.settle()
            pending.dispatch()
            for number in range(1, self.options.max_steps + 1):
                following = self._step(number + 1, pending) if number < self.options.max_steps else None
                shown = self._read(number, pending)
                if all(shown.finished):
                    following = None
                if following is not None:
                    self.cache.settle()
                    following.dispatch()
                pending = following
                yield shown
                if pending is None:
                    return
        finally:
            self.cache.release()

    def _step(self, number: int, previous: _Pending | None) -> _Pending:
        """Step `number`, from 1, as a graph."""
        options = self.options
        last = number == options.max_steps
        canvas = self.start if previous is None else previous.canvas
        hidden = self.model.denoise(canvas, self.cache, previous.soft_embedding if previous else None)
        temperature = sampling.temperature(number, options.max_steps, options.t_min, options.t_max)
        keys = None if last else sampling.draw_keys(*self.draw, number, sampling.SAMPLE)
        tokens, sample, entropy, soft = self.model.read_vocabulary(hidden, temperature, keys)
        if self.pinned is not None:
            tokens = mx.where(self.pinned, self.start, tokens)
        accepted = sampling.accept(entropy, options.entropy_bound, self.pinned)
        done = self.settled if previous is None else previous.finished
        if previous is not None and self.rows > 1:
            tokens = mx.where(done[:, None], previous.tokens, tokens)
        unchanged = sampling.unchanged_steps(
            tokens, previous.tokens if previous else None, previous.unchanged if previous else None
        )
        mean = sampling.mean_entropy(entropy, self.pinned)
        finished = done | sampling.finished(unchanged, mean, options.stability, options.confidence)
        if not last:
            sample = mx.where(accepted, sample, self._noise(number))
            if self.pinned is not None:
                sample = mx.where(self.pinned, self.start, sample)
                soft = mx.where(self.pinned[..., None], self.model.embed(self.start), soft)
            if previous is not None and self.rows > 1:
                sample = mx.where(done[:, None], canvas, sample)
                soft = mx.where(done[:, None, None], previous.soft_embedding, soft)
        report = _packed(tokens, accepted, entropy, finished)
        return _Pending(report, tokens, unchanged, finished, sample, soft)

    def _read(self, number: int, pending: _Pending) -> Step:
        report = np.array(pending.report)
        tokens, accepted, entropy, finished = np.split(report, [self.length * part for part in (1, 2, 3)], axis=1)
        return Step(
            number,
            tokens.tolist(),
            accepted.astype(bool).tolist(),
            entropy.view(np.float32).tolist(),
            finished[:, 0].astype(bool).tolist(),
        )


def _packed(tokens: mx.array, accepted: mx.array, entropy: mx.array, finished: mx.array) -> mx.array:
    parts = [tokens.astype(mx.uint32), accepted.astype(mx.uint32), entropy.view(mx.uint32)]
    return mx.concatenate([*parts, finished[:, None].astype(mx.uint32)], axis=1)
