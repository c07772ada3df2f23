"""Encoded prefixes that are kept from one request to the next, whoever sent them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...generation.prefix import common_length
from ...model.cache import SNAPSHOT_BYTES

if TYPE_CHECKING:
    from ...model.cache import Cache
    from ...model.diffusion_gemma import DiffusionGemma
    from ...processing.processor import Prompt

MOST = 32  # prefixes, so that looking for the best one stays quick where each is small
PLACES = 2  # to go back to: a prompt's end, and where it parts from others
LITTLE = 64  # tokens of a kept prompt that may be lost to the next one rather than copying the prefix


@dataclass(frozen=True)
class _Kept:
    """A cache, and how many of its tokens were a prompt; the rest is the reply."""

    cache: Cache
    prompt_tokens: int

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + sum(snapshot.nbytes for snapshot in self.cache.snapshots)


class PrefixPool:
    """Kept prefixes within `most_bytes`, least recently used first. One thread uses it.

    A request gets the one that has the most in common with its prompt and can go back to that: itself where the request
    goes on with it, as a conversation's next turn does, else a copy, such as of another conversation's instructions.
    """

    def __init__(self, model: DiffusionGemma, most_bytes: int) -> None:
        self.model, self.most_bytes = model, most_bytes
        self._kept: list[_Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Count the bytes that the prefixes hold; memory that two of them share counts twice."""
        return sum(kept.nbytes for kept in list(self._kept))

    def take(self, prompt: Prompt) -> Cache:
        """A cache for a request with this prompt; give it back with `keep`."""
        labels = self.model.labels(prompt.tokens, prompt.images)
        best, reach, shared = None, 0, LITTLE
        for kept in reversed(self._kept):
            common = common_length(labels, kept.cache.labels)
            reached = kept.cache.fork().rewind(common)
            # Even one that cannot go back tells where prompts part: there, `encode_prompt` makes a place to go back to.
            if (reached, common) > (reach, shared):
                best, reach, shared = kept, reached, common
        if best is None:
            return self.model.make_cache(snapshot_bytes=PLACES * SNAPSHOT_BYTES)
        self._kept.remove(best)
        if best.prompt_tokens - shared <= LITTLE:
            return best.cache
        self._kept.append(best)
        return best.cache.fork()

    def keep(self, cache: Cache, prompt: Prompt) -> None:
        """Keep what a request has read, and drop the least recently used beyond the budget."""
        self._add(_Kept(cache, len(prompt.tokens)))

    def _add(self, kept: _Kept) -> None:
        if kept.cache.offset:
            self._kept.append(kept)
        while self._kept and (self.nbytes > self.most_bytes or len(self._kept) > MOST):
            self._kept.pop(0)

    def restore(self, cache: Cache) -> None:
        """Keep a prefix of an earlier run."""
        cache.snapshot_bytes = PLACES * SNAPSHOT_BYTES
        self._add(_Kept(cache, cache.offset))

    def of_prompts(self) -> list[Cache]:
        """Copies of the prefixes as they were where their prompts ended, the least recently used first."""
        copies = [kept.cache.fork() for kept in self._kept]
        for copy, kept in zip(copies, self._kept, strict=True):
            copy.rewind(kept.prompt_tokens)
        return copies

    def clear(self) -> None:
        self._kept.clear()
