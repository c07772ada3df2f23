"""The speculative decoder: a canvas drafts, and a causal pass keeps what the encoder would have written.

Rejection sampling (https://arxiv.org/abs/2211.17192) makes the text distributed exactly as that of the autoregressive
decoder, however good the draft: a token x drawn from q is kept with probability min(1, p(x) / q(x)), and the first that
is not is replaced by one drawn from max(p - q, 0). At temperature 0 it is the same text. One model does both, as in
TiDAR (https://arxiv.org/abs/2511.08923); the pass that verifies is the one that encodes what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ...events import Event
from .. import sampling
from . import drafting
from .drafting import POSITIONS, Drafting, Round, Shown
from .plans import Plan
from .tokens import KEPT, REMEMBERED, REPLACED, TOKEN, candidates, choose_tokens, penalized, token_keys

if TYPE_CHECKING:
    from ...model.diffusion_gemma import DiffusionGemma
    from ...options import Settings
    from ..writer import Writer


class Speculative(Drafting["Row"]):
    """Replies written a draft at a time."""

    def add(self, writer: Writer) -> Iterator[Event]:
        hidden = yield from writer.read_whole_prompt()
        if hidden is None:
            return
        before = mx.array([writer.last_tokens(REMEMBERED)])
        logits = penalized(self.model.logits(hidden)[:, 0], self.options, before)
        first = choose_tokens(logits, self.options, token_keys([writer.options.seed], [0], TOKEN))
        mx.async_eval(first)
        self.start([Row(writer, self.plan.start(), first)])

    def _round(self, rows: list[Row], length: int, steps: int) -> _Draft:
        return _Draft(self.model, self.options, rows, length, steps)


class Row(drafting.Row):
    """One reply: its last token, which the cache does not hold yet, and the plan for its next draft."""

    def __init__(self, writer: Writer, plan: Plan, first: mx.array) -> None:
        super().__init__(writer, plan)
        self.last = 0
        self._first = first  # not read yet

    @property
    def is_last(self) -> bool:
        """Whether the model's context has no room after the last token."""
        return self.writer.context <= 1

    @property
    def before(self) -> list[int]:
        """The REMEMBERED tokens that a penalty looks at, the last known one included; where there are fewer, the first
        stands several times, which changes nothing.
        """
        tokens = self.writer.last_tokens(REMEMBERED)
        return [*tokens[:1] * (REMEMBERED - len(tokens)), *tokens]

    def begin(self) -> list[Event]:
        [self.last] = np.array(self._first).tolist()
        return [self.writer.take([self.last], last=self.is_last)]

    def next_shape(self) -> tuple[int, int]:
        length, steps = self.plan.shape()
        length = min(length, self.writer.context, self.writer.room)
        return length, steps if length > 1 else 0

    def take(self, tokens: list[int], drafted: int, steps: int) -> list[Event]:
        """Take in what was kept of a draft, and the token after it."""
        cache, kept = self.writer.cache, len(tokens) - 1
        cache.trim(drafted - kept)
        cache.labels += [self.last, *tokens[:-1]]
        self.plan.learn(drafted, kept)
        self.writer.count(steps=steps or None, passes=1)
        self.last = tokens[-1]
        return self._take(tokens, steps, last=self.is_last)


class _Draft(Round[Row]):
    """A draft of some replies, the last known token first: what passes the verification is kept."""

    def __init__(self, model: DiffusionGemma, options: Settings, rows: list[Row], length: int, steps: int) -> None:
        super().__init__(model, options, rows, length, steps)
        known = mx.array([[row.last] for row in rows], mx.int32)
        canvas = mx.concatenate([known, self._noise(0)[:, 1:]], axis=1)
        nothing = mx.zeros((len(rows), 0))
        self._state = _State(known, canvas, canvas, nothing, nothing, nothing)

    def _keep(self, staying: list[int]) -> None:
        self._state = self._state.rows(mx.array(staying))

    def _denoised(self) -> list[Shown]:
        """Take a step; the last one draws at every place."""
        number, (known, canvas, _, soft, _, _) = self._taken + 1, self._state
        hidden, reading = self._reading(canvas, soft)
        assert reading.sample is not None and reading.log_total is not None
        pinned = mx.broadcast_to(mx.arange(self.length) == 0, reading.tokens.shape)
        accepted = sampling.accept(reading.entropy, self.options.entropy_bound, pinned)
        best = mx.where(pinned, known, reading.tokens)
        drawn = mx.where(pinned, known, reading.sample)
        if reading.soft_embedding is not None:
            canvas = mx.where(accepted | pinned, drawn, self._noise(number))
            soft = mx.where(pinned[..., None], self.model.embed(known), reading.soft_embedding)
        drafted = best if self.options.temperature == 0 else drawn
        self._state = _State(known, canvas, drafted, soft, hidden, reading.log_total)
        self._cache.settle()
        mx.eval(best, accepted, reading.entropy, self._state)
        columns = (np.array(array).tolist() for array in (best, accepted, reading.entropy))
        return [Shown(number, self.steps + 1, *(column[1:] for column in own)) for own in zip(*columns, strict=True)]

    def _read(self) -> list[list[Event]]:
        found = self._verified()
        return [row.take(own, self.length - 1, self.steps) for row, own in zip(self.rows, found, strict=True)]

    def _verified(self) -> list[list[int]]:
        """The drafted tokens that each row keeps, and the one that comes after them."""
        drafted = self._state.drafted
        hidden = self.model.encode_lazily(drafted, self._cache)
        if self.options.temperature == 0:
            right = self._likeliest(hidden)
            kept = _leading(drafted[:, 1:] == right[:, :-1])
            after = _at(right, kept)[:, 0]
        else:
            kept = _leading(self._passes(hidden))
            after = self._next(hidden, kept)
        mx.eval(kept, after, drafted)
        counts, tokens, last = (np.array(array).tolist() for array in (kept, drafted, after))
        rows = zip(tokens, counts, last, strict=True)
        return [[*own[1 : 1 + count], token] for own, count, token in rows]

    def _likeliest(self, hidden: mx.array) -> mx.array:
        """The likeliest tokens [B, L] after hidden [B, L, H]."""
        if self.options.repetition_penalty == 1:
            return self.model.read_vocabulary(hidden, 1.0).tokens
        return self._in_parts(hidden, lambda logits, _: logits.argmax(axis=-1))

    def _passes(self, hidden: mx.array) -> mx.array:
        """Decide which drafted tokens pass, [B, L - 1]: each with the probability p / q, where it is below 1."""
        if self.length == 1:
            return mx.zeros((len(self.rows), 0), mx.bool_)
        state = self._state
        following = mx.roll(state.drafted, -1, 1).flatten()
        p = self._in_parts(
            hidden, lambda logits, part: candidates(logits, self.options).log_probability_of(following[part])
        )
        q = self._log_q(self.model.logits_of(state.hidden, state.drafted), state.log_total)
        keys = self._token_keys(KEPT)
        uniforms = mx.stack([mx.random.uniform(shape=(self.length - 1,), key=key) for key in keys])
        return mx.log(uniforms) < p[:, :-1] - q[:, 1:]

    def _next(self, hidden: mx.array, kept: mx.array) -> mx.array:
        """Draw the token [B] after those kept: from what p has more than q, or from p where every token passed."""
        logits = self._logits(_at(hidden, kept)[:, 0], _at(self._windows(), kept)[:, 0])
        expected = candidates(logits, self.options)
        if self.length > 1:
            state, place = self._state, mx.minimum(kept + 1, self.length - 1)
            log_q = self._log_q(self.model.logits(_at(state.hidden, place))[:, 0], _at(state.log_total, place))
            log_q = mx.take_along_axis(log_q, expected.ids, axis=-1)
            rest = mx.maximum(mx.exp(expected.log_probabilities) - mx.exp(log_q), 0)
            # Rounding can leave nothing where the two are alike.
            refused = (kept < self.length - 1)[:, None] & (rest.sum(axis=-1, keepdims=True) > 0)
            expected = expected._replace(log_probabilities=mx.where(refused, mx.log(rest), expected.log_probabilities))
        return expected.draw(self._token_keys(REPLACED))

    def _log_q(self, logits: mx.array, log_total: mx.array) -> mx.array:
        """Log probabilities of the distribution that the draft was drawn from: the last step's, at its temperature."""
        options = self.options
        return logits / sampling.temperature(self.steps, self.steps, options.t_min, options.t_max) - log_total

    def _in_parts(self, hidden: mx.array, read: Callable[[mx.array, slice], mx.array]) -> mx.array:
        """Read the logits after hidden [B, L, H], some places at a time, into [B, L]; `read` also gets which they are,
        of all rows' places one after the other.
        """
        rows, windows = hidden.reshape(-1, hidden.shape[-1]), self._windows().reshape(-1, REMEMBERED)
        found: list[mx.array] = []
        for start in range(0, rows.shape[0], POSITIONS):
            part = slice(start, start + POSITIONS)
            # One part after the other: evaluated together, the logits of all would be alive at once.
            found.append(read(self._logits(mx.depends(rows[part], found[-1:]), windows[part]), part))
        return mx.concatenate(found).reshape(hidden.shape[:2])

    def _logits(self, hidden: mx.array, windows: mx.array) -> mx.array:
        """The logits [N, V] after hidden [N, H], under the penalty for the tokens before them, windows [N, n]."""
        return penalized(self.model.logits(hidden[None])[0], self.options, windows)

    def _windows(self) -> mx.array:
        """The tokens that a penalty looks back at from every place, itself included: [B, L, REMEMBERED]."""
        before = mx.array([row.before for row in self.rows])
        tokens = mx.concatenate([before, self._state.drafted[:, 1:]], axis=1)
        return tokens[:, mx.arange(self.length)[:, None] + mx.arange(REMEMBERED)]

    def _token_keys(self, purpose: int) -> mx.array:
        return token_keys([row.writer.options.seed for row in self.rows], [row.round for row in self.rows], purpose)


class _State(NamedTuple):
    """Some rows' drafts between two steps, [B, L] where nothing else is said.

    known [B, 1]: the tokens that they begin with. canvas: what the next step reads. drafted: what is verified if there
    is none. soft_embedding, hidden [B, L, H]: of the last step, whose `log_total` it is too; empty before the first.
    """

    known: mx.array
    canvas: mx.array
    drafted: mx.array
    soft_embedding: mx.array
    hidden: mx.array
    log_total: mx.array

    def rows(self, index: mx.array) -> _State:
        return _State._make(array[index] for array in self)


def _leading(passed: mx.array) -> mx.array:
    """How many of each row's first places passed, before the first that did not: [B, n] -> [B]."""
    return mx.cumprod(passed.astype(mx.int32), axis=1).sum(axis=1)


def _at(array: mx.array, place: mx.array) -> mx.array:
    """One place of each row: array [B, L, ...] and place [B] -> [B, 1, ...]."""
    return array[mx.arange(array.shape[0]), place][:, None]
