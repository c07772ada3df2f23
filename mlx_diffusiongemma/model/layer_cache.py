"""One layer's keys and values of the encoded prefix.

A layer holds one buffer with room past the prefix: a canvas's keys and values are written there in place, so that a
denoising step neither concatenates nor copies the prefix. What lies past the prefix is scratch.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .budgets import CACHE_GROWTH

KeysValues = tuple[mx.array, mx.array]  # [B, heads, N, head_dim] each


class LayerCache:
    """One layer's keys and values; the first `length` positions of its `buffers` are the prefix.

    buffers: [B, heads, capacity, head_dim] each, or None before anything is encoded.
    With a `window`, only the last `window - 1 + keep` tokens stay: what a later token or a rewind of `keep` needs.
    """

    def __init__(self, window: int | None, keep: int):
        self.window = window
        self.keep = keep
        self.buffers: KeysValues | None = None
        self.length = 0
        self._canvas: KeysValues | None = None
        self._spread: KeysValues | None = None

    @property
    def visible(self) -> int:
        """The number of the prefix's tokens that a token right after it can see."""
        return self.visible_of(self.length)

    def visible_of(self, tokens: int) -> int:
        """The number of tokens that a token right after `tokens` others can see."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def append(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Take the next tokens' K/V [B, heads, N, head_dim] in; returns those that they can see, themselves last."""
        self._canvas = self._spread = None
        if self.window is None:
            return self._append_full(keys, values)
        return self._append_sliding(keys, values, self.window - 1 + self.keep)

    def _append_full(self, keys: mx.array, values: mx.array) -> KeysValues:
        end = self.length + keys.shape[2]
        old_keys, old_values = self._reserve(keys, end)
        all_keys, all_values = _written(old_keys, self.length, keys), _written(old_values, self.length, values)
        self.buffers, self.length = (all_keys, all_values), end
        return all_keys[:, :, :end], all_values[:, :, :end]

    def _append_sliding(self, keys: mx.array, values: mx.array, most: int) -> KeysValues:
        """`append` where at most `most` tokens stay."""
        seen = self.visible + keys.shape[2]
        if self.buffers is not None and self.length:
            old_keys, old_values = (array[:, :, : self.length] for array in self.buffers)
            keys, values = mx.concatenate([old_keys, keys], axis=2), mx.concatenate([old_values, values], axis=2)
        self.length = min(keys.shape[2], most)
        kept_keys, kept_values = keys[:, :, -self.length :], values[:, :, -self.length :]
        self.buffers = _with_room(kept_keys, self.keep), _with_room(kept_values, self.keep)
        return keys[:, :, -seen:], values[:, :, -seen:]

    def _reserve(self, like: mx.array, length: int) -> KeysValues:
        """The buffers, or larger ones with the prefix in them: with room for `length` tokens and a canvas."""
        capacity = 0 if self.buffers is None else self.buffers[0].shape[2]
        if self.buffers is not None and length + self.keep <= capacity:
            return self.buffers
        room = -(-(length + self.keep) // CACHE_GROWTH) * CACHE_GROWTH - self.length
        if self.buffers is None:
            rows, heads, _, width = like.shape
            keys = values = mx.zeros((rows, heads, 0, width), like.dtype)
        else:
            keys, values = (array[:, :, : self.length] for array in self.buffers)
        return _with_room(keys, room), _with_room(values, room)

    def with_canvas(self, keys: mx.array, values: mx.array) -> KeysValues:
        """The K/V that a canvas attends to: the visible prefix, then the canvas's own [B', heads, L, head_dim].

        B' is the cache's number of rows, or any number where the cache has one row. The prefix stays as it is; the
        written buffers are adopted by `settle`, which lets the next step write into them in place. Until then, another
        as many canvases are written where these were: in place where the graph has those computed first.
        """
        rows, _, count, _ = keys.shape
        (old_keys, old_values), start = self._base(keys, values, rows)
        end = start + count
        if end > old_keys.shape[2]:
            old_keys, old_values = (_with_room(array[:, :, :start], count) for array in (old_keys, old_values))
        all_keys, all_values = _written(old_keys, start, keys), _written(old_values, start, values)
        self._canvas = (all_keys, all_values)
        first = start - self.visible
        return all_keys[:, :, first:end], all_values[:, :, first:end]

    def _base(self, keys: mx.array, values: mx.array, rows: int) -> tuple[KeysValues, int]:
        """Buffers of `rows` rows to write a canvas into, and where in them the prefix ends."""
        if self.buffers is None:
            return (keys[:, :, :0], values[:, :, :0]), 0
        is_spread = self.buffers[0].shape[0] != rows
        if self._canvas is not None and self._canvas[0].shape[0] == rows:
            return self._canvas, self.visible if is_spread else self.length
        if not is_spread:
            return self.buffers, self.length
        if self._spread is None or self._spread[0].shape[0] != rows:
            keys, values = self.buffers
            self._spread = self._visible_in(keys, rows), self._visible_in(values, rows)
        return self._spread, self.visible

    def _visible_in(self, buffer: mx.array, rows: int) -> mx.array:
        """What a canvas sees of a buffer of one row, in each of `rows` rows, with room for the canvas."""
        seen = buffer[:, :, self.length - self.visible : self.length]
        return _with_room(mx.broadcast_to(seen, (rows, *seen.shape[1:])), self.keep)

    def settle(self) -> None:
        """Adopt the buffers of the last canvas, whose scratch the next canvas may overwrite."""
        if self._canvas is None or self.buffers is None:
            return
        if self._canvas[0].shape[0] == self.buffers[0].shape[0]:
            self.buffers = self._canvas
        else:
            self._spread = self._canvas
        self._canvas = None

    def release(self) -> None:
        """Drop what only a canvas needed."""
        self._canvas = self._spread = None

    def trim(self, tokens: int) -> None:
        self.length -= tokens
        self.release()

    def fork(self) -> LayerCache:
        twin = LayerCache(self.window, self.keep)
        twin.buffers, twin.length = self.buffers, self.length
        return twin

    def rows(self, indices: mx.array) -> LayerCache:
        part = self.fork()
        if self.buffers is not None:
            keys, values = self.buffers
            part.buffers = keys[indices], values[indices]
        return part


class LayerRows:
    """One layer of several caches of one row each: every row attends to its own prefix and canvas."""

    def __init__(self, layers: Sequence[LayerCache]):
        self.layers = layers

    def with_canvas(self, keys: mx.array, values: mx.array) -> list[KeysValues]:
        """The K/V that each row's canvas attends to, for a batch's own [B, heads, L, head_dim]."""
        return [layer.with_canvas(keys[row : row + 1], values[row : row + 1]) for row, layer in enumerate(self.layers)]


def _with_room(array: mx.array, room: int) -> mx.array:
    """`array` [B, heads, N, head_dim] with `room` more positions."""
    return mx.pad(array, [(0, 0), (0, 0), (0, room), (0, 0)])


def _written(buffer: mx.array, start: int, new: mx.array) -> mx.array:
    """`buffer` with `new` at `start`; the caller's array stays what it was. In place where nobody else holds it."""
    target = buffer[:]
    target[:, :, start : start + new.shape[2]] = new
    return target
