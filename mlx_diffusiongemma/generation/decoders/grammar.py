"""Where a reply is in its grammar: what has to come next, and what may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ...errors import PromptError

if TYPE_CHECKING:
    from llguidance import LLMatcher

WORD = 32  # bits of a mask that go into one number


class Guide:
    """Follows one reply through its grammar, token by token."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fork(self) -> Guide:
        """One at the same place, which goes its own way."""
        return Guide(self._matcher.deep_copy())

    @property
    def ended(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._matcher.is_stopped()

    def take(self, tokens: Sequence[int]) -> None:
        """Go on by these tokens, which the grammar allows. Raises PromptError where it is too much work to follow."""
        if not self._matcher.consume_tokens(list(tokens)):
            reason = " ".join(self._matcher.get_error().split("\n<state>")[0].split())[:200].rstrip(".")
            raise PromptError(f"The grammar cannot be followed any further ({reason}); give a simpler one.")

    def forced(self) -> list[int]:
        """Go on by all tokens that leave no choice; which they are."""
        found: list[int] = []
        while not self.ended and (tokens := self._matcher.compute_ff_tokens()):
            # A tokenizer may write forced text with a marker, which is no text to the grammar: then it is chosen.
            tokens = tokens[: self._matcher.validate_tokens(tokens)]
            if not tokens:
                break
            self.take(tokens)
            found += tokens
        return found

    def mask(self) -> np.ndarray:
        """The tokens that may come next, a bit each, uint32 [words]: the end tokens, too, where the reply is whole."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)


def allows(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token // WORD] >> np.uint32(token % WORD) & 1)


def masked(logits: mx.array, masks: Sequence[np.ndarray]) -> mx.array:
    """Logits [N, V] of what the masks, one for each row, allow; -inf for the others."""
    words = mx.array(np.stack(masks))
    bits = (words[..., None] >> mx.arange(WORD, dtype=mx.uint32)) & 1
    return mx.where(bits.reshape(len(masks), -1)[:, : logits.shape[-1]] > 0, logits, -mx.inf)
