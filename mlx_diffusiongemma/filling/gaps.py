"""A text in tokens: what stands there, the gaps in it, and what may stay or go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import PromptError
from .denoisers import Allowed

if TYPE_CHECKING:
    from ..processing.processor import Processor


@dataclass(frozen=True)
class Gap:
    """Room in a text for `least` to `most` tokens.

    draft: what to start from instead of noise. stop: texts that end it. options: the only ways to fill it, if there are
    any; `least` and `most` are theirs. digits: the ids of 0 to 9 where it is a number without leading zeros.
    """

    least: int
    most: int
    draft: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    options: tuple[tuple[int, ...], ...] = ()
    digits: tuple[int, ...] = ()

    @classmethod
    def of(cls, options: Sequence[Sequence[int]]) -> Gap:
        """A gap for one of `options`."""
        lengths = [len(option) for option in options]
        return cls(min(lengths), max(lengths), options=tuple(map(tuple, options)))

    @property
    def is_settled(self) -> bool:
        """Whether its length is known from the start."""
        return self.least == self.most and len(self.options) < 2

    def within(self, most: int) -> Gap:
        """The same gap with so many tokens at most."""
        options = tuple(option for option in self.options if len(option) <= most)
        return replace(self, most=min(self.most, most), options=options)

    def allowed(self, length: int) -> list[Allowed]:
        """List what each position may hold where it has so many tokens."""
        if not self.digits:
            return [None] * length
        first: Allowed = self.digits if length == 1 else self.digits[1:]
        return [first, *[self.digits] * (length - 1)][:length]


@dataclass(frozen=True)
class Anchor:
    """Text that may stay or go: it is kept where the model would write it too, wherever that is.

    bears: the nats by which another token may be likelier than one of its own.
    """

    tokens: tuple[int, ...]
    bears: float


Segment = list[int] | Anchor | Gap


@dataclass(frozen=True)
class Span:
    """A part of a text that stands for so many of its gaps and anchors: `read` says what their tokens, joined, read as,
    and what stands there while one of them is open (None).
    """

    read: Callable[[list[int] | None], str]
    count: int = 1


Piece = str | Span  # of a text


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    places = [place for each in stop if (place := text.find(each)) >= 0]
    return text[: min(places, default=len(text))]


def given_tokens(segments: Sequence[Segment]) -> list[int]:
    return [token for segment in segments if isinstance(segment, list) for token in segment]


def most_tokens(segments: Sequence[Segment]) -> int:
    """The tokens of `segments` up to the last gap, with as many in every gap as it takes. Those between anchors have
    the first one's room.
    """
    last = max((index for index, segment in enumerate(segments) if isinstance(segment, Gap)), default=-1)
    total = 0
    for before, segment in zip([None, *segments], segments[: last + 1], strict=False):
        if not isinstance(segment, Gap):
            total += len(tokens_of(segment))
        elif not isinstance(before, Anchor):
            total += segment.most
    return total


def tokens_of(segment: list[int] | Anchor) -> Sequence[int]:
    return segment if isinstance(segment, list) else segment.tokens


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
