"""The autoregressive decoder: the encoder writes, left to right, a token a step (technical report, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ...events import Event
from ...model.cache import CacheRows, together
from .tokens import REMEMBERED, TOKEN, choose_tokens, penalized, token_keys

if TYPE_CHECKING:
    from ...model.diffusion_gemma import DiffusionGemma
    from ...options import Settings
    from ..writer import Writer


class Autoregressive:
    """Replies written a token at a time, together.

    While a token is computed, the graph of the next one is built and dispatched, and only then is the first one read:
    the one read that blocks. So a reply that ends with that token has been read one token too far, as in mlx-lm.
    """

    def __init__(self, model: DiffusionGemma, options: Settings) -> None:
        self.model, self.options = model, options
        self._rows: list[_Row] = []
        self._tokens = mx.zeros((0,), mx.int32)  # that the rows go on with, [B]; under way

    def add(self, writer: Writer) -> Iterator[Event]:
        hidden = yield from writer.read_whole_prompt()
        if hidden is not None:
            row = _Row(writer)
            self._take_part([row], self._chosen([row], hidden))

    def drop(self, leaving: Sequence[Writer]) -> None:
        staying = [number for number, row in enumerate(self._rows) if row.writer not in leaving]
        if len(staying) == len(self._rows):
            return
        for row in self._rows:
            if row.writer in leaving:
                row.writer.cache.evaluate()  # another thread may be the next to use it
        tokens, rows = self._tokens, [self._rows[number] for number in staying]
        self._rows, self._tokens = [], tokens[:0]
        if rows:
            self._take_part(rows, tokens[mx.array(staying)])

    def step(self) -> Iterator[tuple[Writer, Event]]:
        shown, tokens = self._rows, self._tokens
        if not shown:
            return
        last = [row.is_last for row in shown]
        going = [number for number, row in enumerate(shown) if not last[number]]
        rows = [shown[number] for number in going]
        self._rows, self._tokens = [], tokens[:0]
        # Whatever stops this leaves the caches empty, and never with a token that has no label.
        with CacheRows([row.writer.cache for row in rows]).writing():
            if rows:
                fed = tokens if len(rows) == len(shown) else tokens[mx.array(going)]
                self._take_part(rows, self._following(rows, fed))
            found: list[int] = tokens.tolist()  # type: ignore[assignment]  # MLX's stub does not know the number of axes
            for number in going:
                shown[number].writer.cache.labels.append(found[number])
        for row, token, is_last in zip(shown, found, last, strict=True):
            row.place += 1
            row.writer.count(passes=1)
            yield row.writer, row.writer.take([token], last=is_last)
        self.drop([row.writer for row in shown if row.writer.finish_reason])

    def _take_part(self, rows: list[_Row], tokens: mx.array) -> None:
        """Let rows take part that go on with `tokens`, which are computed from now on."""
        mx.async_eval(tokens)
        self._rows = self._rows + rows
        self._tokens = mx.concatenate([self._tokens, tokens]) if self._tokens.size else tokens

    def _following(self, rows: list[_Row], tokens: mx.array) -> mx.array:
        """The tokens [B] that follow `tokens` [B], which the caches take in."""
        cache = together([row.writer.cache for row in rows])
        return self._chosen(rows, self.model.encode_lazily(tokens[:, None], cache), tokens)

    def _chosen(self, rows: list[_Row], hidden: mx.array, tokens: mx.array | None = None) -> mx.array:
        """The tokens [B] that follow what `hidden` [B, 1, H] is of: the prompts, or `tokens` [B]."""
        under_way = mx.zeros((len(rows), 0), mx.int32) if tokens is None else tokens[:, None]
        before = (
            mx.concatenate([mx.array(row.writer.last_tokens(REMEMBERED - len(own))), own])
            for row, own in zip(rows, under_way, strict=True)
        )
        logits = penalized(self.model.logits(hidden)[:, 0], self.options, before)
        seeds = [row.writer.options.seed for row in rows]
        places = [row.place + (tokens is not None) for row in rows]
        return choose_tokens(logits, self.options, token_keys(seeds, places, TOKEN))


class _Row:
    """One reply: `place` is that of the token under way."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.place = 0

    @property
    def is_last(self) -> bool:
        """Whether no token can follow the one under way."""
        return self.writer.room <= 1 or self.writer.context <= 1
