"""Drafts and the passes that read them: what the decoders that draft have in common.

A canvas drafts, and a causal pass keeps or replaces. Replies whose next drafts have one shape take their denoising
steps and that pass together: a round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import mlx.core as mx

from ...events import Event
from ...model.cache import Cache, CacheRows, together
from .. import sampling
from ..sampling import Draws
from .diffusion import draft_of
from .plans import AdaptivePlan, Plan

if TYPE_CHECKING:
    from ...model.diffusion_gemma import DiffusionGemma
    from ...model.vocabulary import Reading
    from ...options import Settings
    from ..writer import Writer

MOST_STEPS = 16  # of a draft: more of them cost more than its canvas has tokens to give
POSITIONS = 16  # of which the logits over the whole vocabulary exist at once


class Shown(NamedTuple):
    """A draft as a step leaves it, without the known tokens that it begins with."""

    step: int
    max_steps: int
    tokens: list[int]
    accepted: list[bool]
    entropy: list[float]


class Row(ABC):
    """One reply: the plan for its next draft, and the draft at hand."""

    def __init__(self, writer: Writer, plan: Plan) -> None:
        self.writer, self.plan = writer, plan
        self.round = 0  # which the draws depend on
        self._shown: Shown | None = None  # of the draft at hand, after its last step

    @abstractmethod
    def begin(self) -> list[Event]:
        """Take in what the prompt's own pass gave."""

    @abstractmethod
    def next_shape(self) -> tuple[int, int]:
        """The tokens of the next draft, the known ones before them included, and its steps: 0 where there is none."""

    def draft(self, shown: Shown) -> Event:
        self._shown = shown
        return draft_of(self.writer, *shown)

    def _take(self, tokens: list[int], steps: int, *, last: bool) -> list[Event]:
        """Take in tokens that became certain after so many denoising steps; the draft at hand, if there is one, is
        shown once more, as it is now. last: there is no room in the model's context for more.
        """
        events: list[Event] = []
        if self._shown:
            rest = self._shown.tokens[len(tokens) :]
            accepted = [True] * len(tokens) + [False] * len(rest)
            entropy = [*self._shown.entropy, *[0.0] * len(tokens)][: len(accepted)]
            events.append(draft_of(self.writer, steps + 1, steps + 1, [*tokens, *rest], accepted, entropy))
        self.round, self._shown = self.round + 1, None
        return [*events, self.writer.take(tokens, steps=steps, last=last)]


R = TypeVar("R", bound=Row)


class Round(ABC, Generic[R]):
    """Some replies' next passes of one shape: a draft of `length` tokens, denoised for `steps` steps, and the causal
    pass that reads it; or, without steps, that pass alone.
    """

    def __init__(self, model: DiffusionGemma, options: Settings, rows: list[R], length: int, steps: int) -> None:
        self.model, self.options, self.rows = model, options, rows
        self.length, self.steps = length, steps
        self.is_read = False
        self._taken = 0  # steps

    def drop(self, leaving: Sequence[Writer]) -> None:
        staying = [number for number, row in enumerate(self.rows) if row.writer not in leaving]
        if len(staying) == len(self.rows):
            return
        for row in self.rows:
            row.writer.cache.release()
        self.rows = [self.rows[number] for number in staying]
        if self.rows:
            self._keep(staying)

    def step(self) -> Iterator[tuple[Writer, Event]]:
        """Compute the next pass, and give each row's events."""
        if self._taken < self.steps:
            shown = self._denoised()
            self._taken += 1
            yield from [(row.writer, row.draft(own)) for row, own in zip(self.rows, shown, strict=True)]
            return
        # All rows' caches first: whoever reads an event may stop there. What stops this leaves them empty.
        with CacheRows([row.writer.cache for row in self.rows]).writing():
            events = self._read()
        self.is_read = True
        for row, own in zip(self.rows, events, strict=True):
            yield from ((row.writer, event) for event in own)

    @abstractmethod
    def _keep(self, staying: list[int]) -> None:
        """Keep of what is known between two steps the part of these rows."""

    @abstractmethod
    def _denoised(self) -> list[Shown]:
        """Take a denoising step."""

    @abstractmethod
    def _read(self) -> list[list[Event]]:
        """Read the draft in a causal pass, and let each row take in what came of it."""

    @property
    def _cache(self) -> Cache | CacheRows:
        return together([row.writer.cache for row in self.rows])

    def _reading(self, canvas: mx.array, soft_embedding: mx.array) -> tuple[mx.array, Reading]:
        """The hidden states of the diffusion decoder's next step, on a schedule of `steps`, and what they say; the last
        step's leave the soft embedding out.
        """
        options, number = self.options, self._taken + 1
        hidden = self.model.denoise(canvas, self._cache, soft_embedding if self._taken else None)
        temperature = sampling.temperature(number, self.steps, options.t_min, options.t_max)
        keys = self._keys(number, sampling.SAMPLE)
        return hidden, self.model.read_vocabulary(hidden, temperature, keys, condition=number < self.steps)

    def _keys(self, step: int, purpose: int) -> mx.array:
        draws = [Draws(row.writer.options.seed, 0, row.round) for row in self.rows]
        return sampling.draw_keys(draws, [step] * len(draws), purpose)

    def _noise(self, step: int) -> mx.array:
        return sampling.noise(self._keys(step, sampling.NOISE), self.length, self.model.config.text.vocab_size)


class Drafting(ABC, Generic[R]):
    """Replies written a round at a time, together where their rounds have one length and number of steps.

    plan: makes what says how long a reply's next draft is and how many steps it takes; None is an `AdaptivePlan`.
    """

    def __init__(self, model: DiffusionGemma, options: Settings, plan: Plan | None = None) -> None:
        self.model, self.options = model, options
        self.plan = plan or AdaptivePlan(options.canvas_length, min(options.max_steps, MOST_STEPS))
        self._starting: list[R] = []
        self._rounds: list[Round[R]] = []

    def start(self, rows: Iterable[R]) -> None:
        """Let replies take part from the next step on whose prompts are read."""
        self._starting += rows

    def drop(self, leaving: Sequence[Writer]) -> None:
        self._starting = [row for row in self._starting if row.writer not in leaving]
        for group in self._rounds:
            group.drop(leaving)
        self._rounds = [group for group in self._rounds if group.rows]

    def step(self) -> Iterator[tuple[Writer, Event]]:
        starting, self._starting = self._starting, []
        for row in starting:
            yield from ((row.writer, event) for event in row.begin())
        self._group(starting)
        for group in self._rounds:
            yield from group.step()
        ended = [group for group in self._rounds if group.is_read]
        self._rounds = [group for group in self._rounds if not group.is_read]
        self._group([row for group in ended for row in group.rows])

    def _group(self, rows: Sequence[R]) -> None:
        """Begin the next rounds of the replies that go on: those of one length and number of steps together."""
        by_shape: dict[tuple[int, int], list[R]] = {}
        for row in rows:
            if not row.writer.finish_reason:
                by_shape.setdefault(row.next_shape(), []).append(row)
        self._rounds += [self._round(own, *shape) for shape, own in by_shape.items()]

    @abstractmethod
    def _round(self, rows: list[R], length: int, steps: int) -> Round[R]:
        """The next round of these replies."""
