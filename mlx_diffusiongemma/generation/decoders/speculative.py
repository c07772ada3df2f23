"""The speculative decoder: a canvas drafts, and a causal pass keeps what the encoder would have written.

Rejection sampling (https://arxiv.org/abs/2211.17192) makes the text distributed exactly as that of the autoregressive
decoder, however good the draft: a token x drawn from q is kept with probability min(1, p(x) / q(x)), and the first that
is not is replaced by one drawn from max(p - q, 0). At temperature 0 it is the same text. One model does both, as in
TiDAR (https://arxiv.org/abs/2511.08923); the pass that verifies is the one that encodes what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ...events import Event
from ...model.cache import Cache, CacheRows
from .. import sampling
from ..prefix import split_off_end
from ..sampling import Draws
from .diffusion import draft_of
from .plans import AdaptivePlan, Plan
from .tokens import REMEMBERED, candidates, choose_tokens, penalized, token_keys

if TYPE_CHECKING:
    from ...model.diffusion_gemma import DiffusionGemma
    from ...options import Settings
    from ..writer import Writer

TOKEN, KEPT, REPLACED = 0, 1, 2  # what a key is for, beside the draft's own
MOST_STEPS = 16  # of a draft: more of them cost more than its canvas has tokens to give
POSITIONS = 16  # of which the logits over the whole vocabulary exist at once


class Speculative:
    """Replies written a draft at a time, together where their drafts have one length and number of steps.

    plan: makes what says how long a reply's next draft is and how many steps it takes; None is an `AdaptivePlan`.
    """

    def __init__(self, model: DiffusionGemma, options: Settings, plan: Plan | None = None) -> None:
        self.model, self.options = model, options
        self.plan = plan or AdaptivePlan(options.canvas_length, min(options.max_steps, MOST_STEPS))
        self._starting: list[Row] = []
        self._groups: list[_Draft] = []

    def add(self, writer: Writer) -> Iterator[Event]:
        tokens = writer.request.prompt.tokens
        place, images = split_off_end(self.model, writer.request.prompt)
        yield from writer.read_prompt(place)
        if writer.finish_reason:
            return
        hidden = self.model.encode(mx.array([tokens[place:]]), writer.cache, images)
        logits = self.model.logits(hidden[:, -1:])[:, 0]
        if self.options.repetition_penalty != 1:
            logits = penalized(logits, self.options, mx.array(tokens[-REMEMBERED:]))
        first = choose_tokens(logits, self.options, token_keys([writer.options.seed], [0], TOKEN))
        mx.async_eval(first)
        self.start([Row(writer, self.plan.start(), first)])

    def start(self, rows: Sequence[Row]) -> None:
        """Let replies take part from the next step on whose caches hold all but their first tokens."""
        self._starting += rows

    def drop(self, leaving: Sequence[Writer]) -> None:
        self._starting = [row for row in self._starting if row.writer not in leaving]
        for group in self._groups:
            group.drop(leaving)
        self._groups = [group for group in self._groups if group.rows]

    def step(self) -> Iterator[tuple[Writer, Event]]:
        for row in self._starting:
            yield row.writer, row.begin()
        self._group([row for row in self._starting if not row.writer.finish_reason])
        self._starting = []
        for group in self._groups:
            yield from group.step()
        ended = [group for group in self._groups if group.is_verified]
        self._groups = [group for group in self._groups if not group.is_verified]
        self._group([row for group in ended for row in group.rows if not row.writer.finish_reason])

    def _group(self, rows: Sequence[Row]) -> None:
        """Begin the next drafts of these rows: those of one length and number of steps together."""
        by_shape: dict[tuple[int, int], list[Row]] = {}
        for row in rows:
            by_shape.setdefault(row.next_shape(), []).append(row)
        self._groups += [_Draft(self.model, self.options, own, *shape) for shape, own in by_shape.items()]


class Row:
    """One reply: its last token, which the cache does not hold yet, and the plan for its next draft."""

    def __init__(self, writer: Writer, plan: Plan, first: mx.array) -> None:
        self.writer, self.plan = writer, plan
        self.round = 0  # of drafting and verifying, the reply's first token aside
        self.last = 0
        self._first = first  # not read yet
        self._shown: _Shown | None = None  # of the draft at hand, after its last step

    @property
    def is_last(self) -> bool:
        """Whether the model's context has no room after the last token."""
        return self.writer.cache.offset + 1 >= self.writer.model.config.text.max_position_embeddings

    @property
    def before(self) -> list[int]:
        """The REMEMBERED tokens that a penalty looks at, the last known one included; where there are fewer, the first
        stands several times, which changes nothing.
        """
        tokens = [*self.writer.request.prompt.tokens[-REMEMBERED:], *self.writer.tokens][-REMEMBERED:]
        return [*tokens[:1] * (REMEMBERED - len(tokens)), *tokens]

    def begin(self) -> Event:
        """Take in the reply's first token, which the prompt's own pass gave."""
        [self.last] = np.array(self._first).tolist()
        return self.writer.take([self.last], last=self.is_last)

    def next_shape(self) -> tuple[int, int]:
        """The tokens of the next draft, the last known one before them included, and its steps."""
        self._shown = None
        length, steps = self.plan.shape()
        context = self.writer.model.config.text.max_position_embeddings - self.writer.cache.offset
        length = min(length, context, self.writer.room)
        return length, steps if length > 1 else 0

    def draft(self, shown: _Shown) -> Event:
        self._shown = shown
        return draft_of(self.writer, self.round + 1, *shown)

    def take(self, tokens: list[int], drafted: int, steps: int) -> list[Event]:
        """Take in what was kept of a draft, and the token after it. The draft is shown once more, as it is now."""
        writer, cache, kept = self.writer, self.writer.cache, len(tokens) - 1
        cache.trim(drafted - kept)
        cache.labels += [self.last, *tokens[:-1]]
        self.plan.learn(drafted, kept)
        writer.count(steps=steps or None, passes=1)
        events: list[Event] = []
        if self._shown:
            rest = self._shown.tokens[len(tokens) :]
            accepted = [True] * len(tokens) + [False] * len(rest)
            entropy = [*self._shown.entropy, 0.0][: len(accepted)]
            verified = _Shown(steps + 1, steps + 1, [*tokens, *rest], accepted, entropy)
            events.append(draft_of(writer, self.round + 1, *verified))
        self.round, self.last = self.round + 1, tokens[-1]
        events.append(writer.take(tokens, steps=steps, last=self.is_last))
        return events


class _Shown(NamedTuple):
    """A draft as a step leaves it, without the known token that it begins with."""

    step: int
    max_steps: int
    tokens: list[int]
    accepted: list[bool]
    entropy: list[float]


class _Draft:
    """Some replies' drafts of one shape: `length` tokens, the last known one first, denoised for `steps` steps and then
    verified, a forward pass each.
    """

    def __init__(self, model: DiffusionGemma, options: Settings, rows: list[Row], length: int, steps: int) -> None:
        self.model, self.options, self.rows = model, options, rows
        self.length, self.steps = length, steps
        self.is_verified = False
        self._taken = 0  # steps
        known = mx.array([[row.last] for row in rows], mx.int32)
        canvas = mx.concatenate([known, self._noise(0)[:, 1:]], axis=1)
        nothing = mx.zeros((len(rows), 0))
        self._state = _State(known, canvas, canvas, nothing, nothing, nothing)

    def drop(self, leaving: Sequence[Writer]) -> None:
        staying = [number for number, row in enumerate(self.rows) if row.writer not in leaving]
        if len(staying) == len(self.rows):
            return
        for row in self.rows:
            row.writer.cache.release()
        self.rows = [self.rows[number] for number in staying]
        if self.rows:
            self._state = self._state.rows(mx.array(staying))

    def step(self) -> Iterator[tuple[Writer, Event]]:
        """Compute the next pass, and give each row's event."""
        if self._taken < self.steps:
            shown = self._denoised()
            self._taken += 1
            yield from [(row.writer, row.draft(own)) for row, own in zip(self.rows, shown, strict=True)]
            return
        # All rows' caches first: whoever reads an event may stop there. What stops this leaves them empty.
        with CacheRows([row.writer.cache for row in self.rows]).writing():
            found = self._verified()
            events = [row.take(own, self.length - 1, self.steps) for row, own in zip(self.rows, found, strict=True)]
        self.is_verified = True
        for row, own in zip(self.rows, events, strict=True):
            yield from ((row.writer, event) for event in own)

    @property
    def _cache(self) -> Cache | CacheRows:
        caches = [row.writer.cache for row in self.rows]
        return caches[0] if len(caches) == 1 else CacheRows(caches)

    def _denoised(self) -> list[_Shown]:
        """Take a step: of the diffusion decoder's, on a schedule of this many. The last one draws at every place."""
        options, number, cache = self.options, self._taken + 1, self._cache
        known, canvas = self._state.known, self._state.canvas
        hidden = self.model.denoise(canvas, cache, self._state.soft_embedding if self._taken else None)
        temperature = sampling.temperature(number, self.steps, options.t_min, options.t_max)
        keys = self._keys(number, sampling.SAMPLE)
        reading = self.model.read_vocabulary(hidden, temperature, keys)
        assert reading.sample is not None and reading.soft_embedding is not None and reading.log_total is not None
        pinned = mx.broadcast_to(mx.arange(self.length) == 0, canvas.shape)
        accepted = sampling.accept(reading.entropy, options.entropy_bound, pinned)
        best = mx.where(pinned, known, reading.tokens)
        drawn = mx.where(pinned, known, reading.sample)
        canvas = mx.where(accepted | pinned, drawn, self._noise(number))
        soft = mx.where(pinned[..., None], self.model.embed(known), reading.soft_embedding)
        drafted = best if options.temperature == 0 else drawn
        self._state = _State(known, canvas, drafted, soft, hidden, reading.log_total)
        cache.settle()
        mx.eval(best, accepted, reading.entropy, self._state)
        columns = (np.array(array).tolist() for array in (best, accepted, reading.entropy))
        return [_Shown(number, self.steps + 1, *(column[1:] for column in own)) for own in zip(*columns, strict=True)]

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
        logits = self.model.logits(hidden[None])[0]
        if self.options.repetition_penalty == 1:
            return logits
        rows = [penalized(row[None], self.options, before) for row, before in zip(logits, windows, strict=True)]
        return mx.concatenate(rows)

    def _windows(self) -> mx.array:
        """The tokens that a penalty looks back at from every place, itself included: [B, L, REMEMBERED]."""
        before = mx.array([row.before for row in self.rows])
        tokens = mx.concatenate([before, self._state.drafted[:, 1:]], axis=1)
        return tokens[:, mx.arange(self.length)[:, None] + mx.arange(REMEMBERED)]

    def _keys(self, step: int, purpose: int) -> mx.array:
        draws = [Draws(row.writer.options.seed, 0, row.round) for row in self.rows]
        return sampling.draw_keys(draws, [step] * len(draws), purpose)

    def _token_keys(self, purpose: int) -> mx.array:
        return token_keys([row.writer.options.seed for row in self.rows], [row.round for row in self.rows], purpose)

    def _noise(self, step: int) -> mx.array:
        return sampling.noise(self._keys(step, sampling.NOISE), self.length, self.model.config.text.vocab_size)


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
