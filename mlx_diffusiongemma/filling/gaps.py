"""A text with gaps in tokens, and how it lies on a canvas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import PromptError
from ..generation.canvas import Canvas
from .denoisers import Allowed

if TYPE_CHECKING:
    from ..processing.processor import Processor

LENGTHS = 8  # of one gap, tried together


@dataclass(frozen=True)
class Filling:
    """A way to begin a gap: a token per position, None for noise. pinned: it stays as it is. allowed: what each
    position may take; empty where anything.
    """

    tokens: tuple[int | None, ...]
    pinned: bool = False
    allowed: tuple[Allowed, ...] = ()


@dataclass(frozen=True)
class Gap:
    """Room in a text, and the fillings to try."""

    fillings: tuple[Filling, ...]

    @property
    def longest(self) -> int:
        return max(len(filling.tokens) for filling in self.fillings)


Segment = list[int] | Gap
# Of a text: as it stands, or what the tokens of a gap read as, and what stands there while it is open (None).
Piece = str | Callable[[list[int] | None], str]


class GappedCanvas(NamedTuple):
    """A canvas on which text and gaps lie.

    gaps: the first position of each and the one after its last. fixed: those gaps whose filling is pinned. end: after
    the last token of the text and the first one of its ending; the rest is no part of it.
    """

    canvas: Canvas
    allowed: tuple[Allowed, ...]
    gaps: tuple[tuple[int, int], ...]
    fixed: tuple[bool, ...]
    end: int

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.gaps)

    @property
    def tokens(self) -> list[int]:
        """The tokens of a canvas that is filled: one at every position."""
        return [token for token in self.canvas.tokens if token is not None]

    def filled(self, tokens: Sequence[int]) -> GappedCanvas:
        """The same canvas after denoising."""
        return self._replace(canvas=Canvas(tokens, self.canvas.pinned))


def longest_gap(canvas_length: int) -> int:
    """The most tokens that a gap may have: three quarters of a canvas, so that some of what follows lies beside it."""
    return canvas_length * 3 // 4


def most_tokens(segments: Sequence[Segment]) -> int:
    """The tokens of `segments` with the longest filling in every gap."""
    return sum(segment.longest if isinstance(segment, Gap) else len(segment) for segment in segments)


def given_tokens(segments: Sequence[Segment]) -> list[int]:
    """The tokens of `segments`, without those that the gaps will have."""
    return [token for segment in segments if not isinstance(segment, Gap) for token in segment]


def least_room(segments: Sequence[Segment]) -> int:
    """The tokens that the gaps among `segments` take at least."""
    return sum(min(len(own.tokens) for own in gap.fillings) for gap in segments if isinstance(gap, Gap))


def lengths_up_to(most: int) -> list[int]:
    """Choose at most LENGTHS lengths from short to `most`, evenly apart."""
    count = min(most, LENGTHS)
    return [math.ceil(most * part / count) for part in range(1, count + 1)]


def text_tokens(processor: Processor, text: str) -> list[int]:
    """The ids of a text that is content and nothing else: what looks like a marker in it is spelled out.

    Raises PromptError where it is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"The text is not valid Unicode ({error.reason}); check where it comes from.") from None
    ids: list[int] = processor.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def lay_out(
    window: Sequence[Segment], choices: Sequence[int], length: int, ending: Sequence[int] | None
) -> GappedCanvas:
    """Lay `window` on a canvas of `length`, with the chosen filling in each gap and all else pinned.

    ending: what follows the text where it ends on this canvas; its last token fills the rest. None: the rest is free.
    """
    tokens: list[int | None] = []
    pinned: list[bool] = []
    allowed: list[Allowed] = []
    gaps: list[tuple[int, int]] = []
    fixed: list[bool] = []
    rest = iter(choices)
    for segment in window:
        filling = segment.fillings[next(rest)] if isinstance(segment, Gap) else Filling(tuple(segment), pinned=True)
        if isinstance(segment, Gap):
            gaps.append((len(tokens), len(tokens) + len(filling.tokens)))
            fixed.append(filling.pinned)
        tokens += filling.tokens
        pinned += [filling.pinned] * len(filling.tokens)
        allowed += filling.allowed or [None] * len(filling.tokens)
    end = min(len(tokens) + (ending is not None), length)
    if ending is not None:
        tokens += [*ending, *[ending[-1]] * length]
    tokens, pinned, allowed = tokens[:length], pinned[:length], allowed[:length]
    tokens += [None] * (length - len(tokens))
    pinned += [ending is not None] * (length - len(pinned))
    allowed += [None] * (length - len(allowed))
    return GappedCanvas(Canvas(tokens, pinned), tuple(allowed), tuple(gaps), tuple(fixed), end)
