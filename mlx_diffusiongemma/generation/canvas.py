"""The canvas a caller starts from: tokens to begin with, and positions that never change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import CanvasError


@dataclass(frozen=True)
class Canvas:
    """Starting tokens (None: noise) and which of them are pinned: read by the model, never changed.

    One longer than a canvas goes on in the next ones; positions it does not name start as noise. The reply ends at the
    first end token: text after it is left out, pinned or not, so one that comes before a pin cuts the pin off.
    Raises CanvasError where a pinned position has no token or the lengths differ.
    """

    tokens: Sequence[int | None]
    pinned: Sequence[bool] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "pinned", tuple(map(bool, self.pinned)) or (False,) * len(self.tokens))
        if len(self.tokens) != len(self.pinned):
            raise CanvasError(
                f"The canvas has {len(self.tokens)} tokens but {len(self.pinned)} pin marks; give one for each token."
            )
        for position, (token, pinned) in enumerate(zip(self.tokens, self.pinned, strict=True)):
            if pinned and token is None:
                raise CanvasError(f"Position {position} of the canvas is pinned but has no token; give it one.")
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                raise CanvasError(f"Position {position} of the canvas holds {token!r}; give a token id or None.")

    def check(self, vocabulary: int) -> None:
        """Raises CanvasError where an id is not in a vocabulary of this size."""
        for position, token in enumerate(self.tokens):
            if token is not None and not 0 <= token < vocabulary:
                raise CanvasError(
                    f"Position {position} of the canvas holds id {token}; the vocabulary has ids 0 to {vocabulary - 1}."
                )

    def part(self, number: int, length: int) -> Canvas:
        """The `length` positions of the canvas with this number (from 0), filled up with noise."""
        tokens = self.tokens[number * length : (number + 1) * length]
        pinned = self.pinned[number * length : (number + 1) * length]
        rest = length - len(tokens)
        return Canvas([*tokens, *[None] * rest], [*pinned, *[False] * rest])
