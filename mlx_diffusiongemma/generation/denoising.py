"""The loop over denoising steps, as the reference's `generate` runs it, for canvases that come and go."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..model.cache import Cache, CacheRows, together
from . import sampling
from .canvas import Canvas
from .sampling import Draws

if TYPE_CHECKING:
    from ..model.vocabulary import Reading
    from ..options import Settings


class Denoiser(Protocol):
    """The part of a model that the loop calls: see `model.diffusion_gemma.DiffusionGemma`."""

    def denoise(self, canvas: mx.array, cache: Cache | CacheRows, self_conditioning: mx.array | None) -> mx.array: ...

    def read_vocabulary(self, hidden: mx.array, temperature: float | mx.array, key: mx.array | None) -> Reading: ...

    def embed(self, tokens: mx.array) -> mx.array: ...


@dataclass(frozen=True, eq=False)
class Job:
    """One canvas to denoise: where it starts, the prefix that it follows, and what its draws depend on."""

    canvas: Canvas
    cache: Cache
    draws: Draws


class Step(NamedTuple):
    """One canvas as a step, counted from 1, leaves it: its argmax tokens, which positions are accepted, their entropies
    in nats, and whether the canvas is done. notes [K]: what a reader noted, float32.
    """

    job: Job
    number: int
    tokens: list[int]
    accepted: list[bool]
    entropy: list[float]
    finished: bool
    notes: np.ndarray


class Reader(Protocol):
    """Reads the vocabulary for the loop in the model's place: where not every position may hold every token, or where
    more is asked of a step. What it notes of every row, [B, K] float32, comes with the step's report.
    """

    def read(
        self, hidden: mx.array, temperature: float | mx.array, key: mx.array | None, jobs: Sequence[Job]
    ) -> tuple[Reading, mx.array | None]: ...


class Denoising:
    """Canvases of one length being denoised together, a row each.

    A canvas comes with `add`, and leaves once it is done or with `drop`: no step computes a row that is not needed.
    Canvases follow one prefix (they share a cache of one row) or each its own, and need not be at the same step.

    reader: reads the vocabulary; None is the model itself.
    """

    def __init__(self, model: Denoiser, options: Settings, vocabulary: int, reader: Reader | None = None) -> None:
        self.model, self.options, self.vocabulary, self.reader = model, options, vocabulary, reader
        self._joining: list[Job] = []
        self._pending: Pending | None = None

    @property
    def jobs(self) -> list[Job]:
        """The canvases at work."""
        return [*(self._pending.after.jobs if self._pending else ()), *self._joining]

    def add(self, job: Job) -> None:
        """Let a canvas take part from the next step on that is not under way yet."""
        self._joining.append(job)

    def drop(self, leaving: Sequence[Job]) -> None:
        """Let canvases leave, whatever they are like; what they held beside their prefixes is freed."""
        if not leaving:
            return
        self._joining = [job for job in self._joining if job not in leaving]
        if self._pending:
            staying = [row for row, job in enumerate(self._pending.after.jobs) if job not in leaving]
            self._pending = self._pending.rows(staying) if staying else None
        for job in leaving:
            job.cache.release()

    def replace(self, job: Job, others: Sequence[Job]) -> None:
        """Let others of the same length go on in a canvas's place, each from what has become of it.

        Only what their canvases name is different from then on: those tokens are written, and stay where pinned. The
        step under way, if any, is still of the canvas that leaves, but finishes none of the others.
        """
        if job in self._joining:
            at = self._joining.index(job)
            self._joining[at : at + 1] = others
        elif self._pending:
            self._pending = self._pending.replaced(job, others, self.model.embed)

    def steps(self) -> Generator[list[Step], None, None]:
        """Run until every canvas is done; closing the iterator drops those that are left."""
        try:
            while self.jobs:
                yield self.step()
        finally:
            self.drop(self.jobs)

    def step(self) -> list[Step]:
        """Wait for the step under way, start the next one, and say what the finished one shows, row by row.

        While the device computes a step, the graph of the next one is built. It is dispatched once the stop flags have
        been read, which is the only read that blocks, and before the caller sees the step.
        """
        if self._pending is None:
            self._pending = self._dispatched(self._compute(self._newcomers()))
            self._joining = []
        pending, newcomers = self._pending, self._newcomers()
        if pending is None:
            return []
        going = [row for row, number in enumerate(pending.after.numbers) if number < self.options.max_steps]
        following = self._compute(pending.after.rows(going) + newcomers)
        report = np.array(pending.report)
        shown = pending.shown(report, self.options.max_steps)
        staying = [row for row in going if not shown[row].finished]
        if not self._suits(report[staying], newcomers) or staying != going:
            # That graph computes rows which are done: drop it, so that it holds no buffer, and build a smaller one.
            del following
            for state in (pending.after, *newcomers):
                for job in state.jobs:
                    job.cache.release()
            following = self._compute(pending.after.rows(staying) + newcomers)
        self._pending, self._joining = self._dispatched(following), []
        used = {id(job.cache) for job in self.jobs}
        for step in shown:
            if step.finished and id(step.job.cache) not in used:
                step.job.cache.release()
        return shown

    def _newcomers(self) -> list[State]:
        """The canvases that wait to join, before their first step: one state, or none."""
        jobs = self._joining
        if not jobs:
            return []
        rows, length = len(jobs), len(jobs[0].canvas.tokens)
        start = self._noise(jobs, [0] * rows, length)
        canvases = [job.canvas for job in jobs]
        if any(token is not None for canvas in canvases for token in canvas.tokens):
            given = _given(jobs)
            start = mx.where(given < 0, start, given)
        pinned = mx.array([canvas.pinned for canvas in canvases]) if any(any(c.pinned) for c in canvases) else None
        no_tokens, no_steps = mx.full((rows, length), -1, mx.int32), mx.zeros((rows,), mx.int32)
        return [State(jobs, [0] * rows, start, no_tokens, no_steps, start, None, pinned)]

    def _compute(self, states: list[State]) -> Pending | None:
        """The graph of the next step of all rows in `states`, of which there are at most two; None without any."""
        if not states:
            return None
        state = states[0] if len(states) == 1 else states[0].joined(states[1])
        options, jobs, numbers = self.options, state.jobs, [number + 1 for number in state.numbers]
        cache = together([job.cache for job in jobs])
        heat = [sampling.temperature(number, options.max_steps, options.t_min, options.t_max) for number in numbers]
        temperature = heat[0] if len(set(heat)) == 1 else mx.array(heat)
        goes_on = min(numbers) < options.max_steps
        keys = sampling.draw_keys([job.draws for job in jobs], numbers, sampling.SAMPLE) if goes_on else None
        reading, notes = self._read(state, cache, temperature, keys)
        tokens, sample, entropy, soft, _ = reading
        pinned, start = state.pinned, state.start
        if pinned is not None:
            tokens = mx.where(pinned, start, tokens)
        accepted = sampling.accept(entropy, options.entropy_bound, pinned)
        unchanged = sampling.unchanged_steps(tokens, state.tokens, state.unchanged)
        mean = sampling.mean_entropy(entropy, pinned)
        finished = sampling.finished(unchanged, mean, options.stability, options.confidence)
        canvas = state.canvas
        if sample is not None:
            canvas = mx.where(accepted, sample, self._noise(jobs, numbers, tokens.shape[1]))
            if pinned is not None:
                canvas = mx.where(pinned, start, canvas)
        if soft is not None and pinned is not None:
            soft = mx.where(pinned[..., None], self.model.embed(start), soft)
        after = State(jobs, numbers, canvas, tokens, unchanged, start, soft, pinned, sample, entropy)
        after, flags = self._planned(state, after, accepted, mean, finished)
        return Pending(_packed(tokens, accepted, entropy, flags, notes), after, cache)

    def _read(
        self, state: State, cache: Cache | CacheRows, temperature: float | mx.array, keys: mx.array | None
    ) -> tuple[Reading, mx.array | None]:
        """What the model says of every position of the canvases, and a reader's notes."""
        hidden = self.model.denoise(state.canvas, cache, state.soft_embedding)
        if self.reader is None:
            return self.model.read_vocabulary(hidden, temperature, keys), None
        return self.reader.read(hidden, temperature, keys, state.jobs)

    def _planned(
        self, before: State, after: State, accepted: mx.array, mean: mx.array, finished: mx.array
    ) -> tuple[State, mx.array]:
        """The state that the next step starts from, and the flags to report, [B, F]: first, which canvases are done."""
        return after._replace(sample=None, entropy=None), finished[:, None]

    def _suits(self, report: np.ndarray, newcomers: list[State]) -> bool:
        """Whether the next step's graph, which was built before the report was read, is the right one for the canvases
        that stay, a row of the report each, and the newcomers.
        """
        return True

    def _noise(self, jobs: Sequence[Job], steps: Sequence[int], length: int) -> mx.array:
        keys = sampling.draw_keys([job.draws for job in jobs], steps, sampling.NOISE)
        return sampling.noise(keys, length, self.vocabulary)

    def _dispatched(self, pending: Pending | None) -> Pending | None:
        """The same step, on its way to the device; from now on the next may write where this one's canvases lie."""
        if pending is not None:
            pending.cache.settle()
            mx.async_eval([pending.report, *pending.after.arrays])
        return pending


class State(NamedTuple):
    """Some canvases between two steps: all that the next one starts from.

    numbers: the steps that each has had. canvas [B, L]: the tokens to read. tokens [B, L] and unchanged [B]: the last
    argmax canvas, and for how many steps it has been the same. start [B, L]: where they began. soft_embedding
    [B, L, H]: None before the first step. pinned [B, L]: None where no position of any canvas is. The rest is None but
    for `decoders.active_rows`, which says what it is.
    """

    jobs: list[Job]
    numbers: list[int]
    canvas: mx.array
    tokens: mx.array
    unchanged: mx.array
    start: mx.array
    soft_embedding: mx.array | None
    pinned: mx.array | None
    sample: mx.array | None = None
    entropy: mx.array | None = None
    held: mx.array | None = None
    computed: mx.array | None = None
    order: mx.array | None = None
    size: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in self[2:] if array is not None]

    def rows(self, rows: list[int]) -> list[State]:
        """The state of some of the rows: one, or none where `rows` is empty."""
        if not rows:
            return []
        if len(rows) == len(self.jobs):
            return [self]
        index = mx.array(rows)
        lists = [self.jobs[row] for row in rows], [self.numbers[row] for row in rows]
        return [State._make([*lists, *(None if array is None else array[index] for array in self[2:])])]

    def rewritten(
        self, index: list[int], jobs: list[Job], own: mx.array, embed: Callable[[mx.array], mx.array]
    ) -> State:
        """The state of these rows, some more than once, as that of other jobs: what their canvases name is written in
        the rows that are their `own` [B, 1], and what they pin is pinned and believed.
        """
        rows = mx.array(index)
        given = _given(jobs)
        named, pinned = own & (given >= 0), mx.array([job.canvas.pinned for job in jobs])
        start = mx.where(named, given, self.start[rows])
        soft = self.soft_embedding
        return State(
            jobs,
            [self.numbers[number] for number in index],
            mx.where(named, given, self.canvas[rows]),
            mx.where(named, given, self.tokens[rows].astype(given.dtype)),
            self.unchanged[rows],
            start,
            None if soft is None else mx.where((own & pinned)[..., None], embed(start), soft[rows]),
            pinned,
        )

    def joined(self, other: State) -> State:
        """These rows and then the others. What only one side has is zero for the other: nothing believed or pinned."""
        arrays = (
            _stacked(mine, theirs, len(self.jobs), len(other.jobs))
            for mine, theirs in zip(self[2:], other[2:], strict=True)
        )
        return State._make([self.jobs + other.jobs, self.numbers + other.numbers, *arrays])


class Pending(NamedTuple):
    """A step under way. `report` [B, 3 L + flags + notes] holds all that is read back, so that one read blocks."""

    report: mx.array
    after: State
    cache: Cache | CacheRows

    def rows(self, rows: list[int]) -> Pending:
        """The same step, of some of its rows."""
        return self._replace(report=self.report[mx.array(rows)], after=self.after.rows(rows)[0])

    def shown(self, report: np.ndarray, max_steps: int) -> list[Step]:
        """Say what the report, read back, shows. The last step that a canvas may take finishes it."""
        length = self.after.tokens.shape[1]
        borders = [length, 2 * length, 3 * length, 3 * length + 1]
        tokens, accepted, entropy, finished, notes = np.split(report, borders, axis=1)
        done = (finished[:, 0] > 0) | (np.array(self.after.numbers) >= max_steps)
        columns = [column.tolist() for column in (tokens, accepted.astype(bool), entropy.view(np.float32), done)]
        rows = zip(self.after.jobs, self.after.numbers, *columns, notes.view(np.float32), strict=True)
        return [Step(*row) for row in rows]

    def replaced(self, job: Job, others: Sequence[Job], embed: Callable[[mx.array], mx.array]) -> Pending:
        """The same step, with `others` in the place of a row: see `Denoising.replace`."""
        after, row = self.after, self.after.jobs.index(job)
        index = [*range(row), *[row] * len(others), *range(row + 1, len(after.jobs))]
        own = mx.array([number == row for number in index])[:, None]
        report = self.report[mx.array(index)]
        finished = mx.arange(report.shape[1]) == 3 * after.tokens.shape[1]
        jobs = [*after.jobs[:row], *others, *after.jobs[row + 1 :]]
        return self._replace(report=mx.where(own & finished, 0, report), after=after.rewritten(index, jobs, own, embed))


def _given(jobs: Sequence[Job]) -> mx.array:
    """The tokens that the canvases name, [B, L]; -1 where they name none."""
    return mx.array([[-1 if token is None else token for token in job.canvas.tokens] for job in jobs])


def _packed(
    tokens: mx.array, accepted: mx.array, entropy: mx.array, flags: mx.array, notes: mx.array | None
) -> mx.array:
    parts = [tokens.astype(mx.uint32), accepted.astype(mx.uint32), entropy.view(mx.uint32), flags.astype(mx.uint32)]
    return mx.concatenate([*parts, *([] if notes is None else [notes.view(mx.uint32)])], axis=1)


def _stacked(first: mx.array | None, second: mx.array | None, rows: int, other_rows: int) -> mx.array | None:
    known = second if first is None else first
    if known is None:
        return None
    first = mx.zeros((rows, *known.shape[1:]), known.dtype) if first is None else first
    second = mx.zeros((other_rows, *known.shape[1:]), known.dtype) if second is None else second
    return mx.concatenate([first, second])
