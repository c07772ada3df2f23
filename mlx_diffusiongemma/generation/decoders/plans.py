"""Plans: how long a speculative draft is, and how many steps it takes, from what was kept of those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Plan(Protocol):
    """Says the shape of one reply's next draft. It may depend on that reply alone, or its text would on others."""

    def start(self) -> Plan:
        """A plan for a new reply."""
        ...

    def shape(self) -> tuple[int, int]:
        """The tokens of the next draft, the known one before them included, and its denoising steps."""
        ...

    def learn(self, drafted: int, kept: int) -> None:
        """Take in how many of the tokens drafted were kept."""
        ...


@dataclass(frozen=True)
class FixedPlan:
    """Drafts of one shape."""

    length: int
    steps: int

    def start(self) -> FixedPlan:
        return self

    def shape(self) -> tuple[int, int]:
        return self.length, self.steps

    def learn(self, drafted: int, kept: int) -> None:
        pass


# A pass over a canvas reads every expert, and one over a token a few: on the Macs that were measured, as much as this
# many rows of the canvas take (M2 Ultra: 49 ms and 0.83 ms a row; 14 ms a token).
CANVAS_COST, TOKEN_COST = 60, 17
# Before anything is known, a draft is expected to keep this many tokens for each of its steps. What is learnt is
# forgotten slowly, so that drafts are tried again where they were given up.
KEPT_PER_STEP, REMEMBERED_SHARE = 12, 0.98


class AdaptivePlan:
    """Drafts of the shape that promises the most tokens for the work, or none where single tokens promise more.

    What is learnt for each number of steps is how likely the next drafted token is kept if those before it are.
    longest: most tokens of a draft. most_steps: most denoising steps.
    """

    def __init__(self, longest: int, most_steps: int) -> None:
        self.longest, self.most_steps = longest, most_steps
        self._lengths = _doubled(8, longest)
        self._seen = dict.fromkeys(_doubled(1, most_steps), (0.0, 0.0))  # tokens kept, and refused
        self._steps = 0  # of the draft at hand

    def start(self) -> AdaptivePlan:
        return AdaptivePlan(self.longest, self.most_steps)

    def shape(self) -> tuple[int, int]:
        shapes = [(length, steps) for steps in self._seen for length in self._lengths]
        length, steps = max(shapes, key=lambda shape: self._rate(*shape))
        if self._rate(length, steps) < 1 / TOKEN_COST:
            length, steps = 1, 0
        self._steps = steps
        return length, steps

    def learn(self, drafted: int, kept: int) -> None:
        for steps, (good, bad) in self._seen.items():
            self._seen[steps] = good * REMEMBERED_SHARE, bad * REMEMBERED_SHARE
        if drafted and self._steps:
            good, bad = self._seen[self._steps]
            self._seen[self._steps] = good + kept, bad + (kept < drafted)

    def _rate(self, length: int, steps: int) -> float:
        """Tokens that a draft is expected to give, by its cost in rows."""
        good, bad = self._seen[steps]
        share = (good + KEPT_PER_STEP * steps) / (good + bad + KEPT_PER_STEP * steps + 1)
        kept = sum(share**place for place in range(1, length))
        return (kept + 1) / ((steps + 1) * (CANVAS_COST + length))


def _doubled(first: int, last: int) -> list[int]:
    """`first` and what doubling it gives, up to `last`."""
    found = [min(first, last)]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found
