"""One layer's keys and values of the encoded prefix.

A layer holds one buffer with room past the prefix: a canvas's keys and values are written there in place, so that a
denoising step neither concatenates nor copies the prefix. What lies past the prefix is scratch.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .budgets import CACHE_GROWTH


class LayerCache:
    """One layer's keys and values, [B, heads, capacity, head_dim]; the first `length` positions are the prefix.

    With a `window`, only the last `window - 1 + keep` tokens stay: what a later token or a rewind of `keep` needs.
    """

    def __init__(self, window: int | None, keep: int):
        self.window = window
        self.keep = keep
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0
        self._canvas: tuple[mx.array, mx.array] | None = None
        self._spread: tuple[mx.array, mx.array] | None = None

    @property
    def visible(self) -> int:
        """How many tokens of the prefix a token right after it can see."""
        return self.length if self.window is None else min(self.length, self.window - 1)

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take the next tokens' K/V [B, heads, N, head_dim] in; returns those that they can see, themselves last."""
        self._canvas = self._spread = None
        if self.window is None:
            return self._append_full(keys, values)
        return self._append_sliding(keys, values)

    def _append_full(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        end = self.length + keys.shape[2]
        self._reserve(keys, end)
        self.keys = _written(self.keys, self.length, keys)
        self.values = _written(self.values, self.length, values)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _append_sliding(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        held = [(self.keys, keys), (self.values, values)]
        if self.length:
            joined = [mx.concatenate([old[:, :, : self.length], new], axis=2) for old, new in held]
        else:
            joined = [new for _, new in held]
        seen = self.visible + keys.shape[2]
        self.length = min(self.length + keys.shape[2], self.window - 1 + self.keep)
        self.keys, self.values = (_with_room(array[:, :, -self.length :], self.keep) for array in joined)
        return joined[0][:, :, -seen:], joined[1][:, :, -seen:]

    def _reserve(self, like: mx.array, length: int) -> None:
        """Room for `length` tokens and a canvas."""
        capacity = 0 if self.keys is None else self.keys.shape[2]
        if length + self.keep <= capacity:
            return
        room = -(-(length + self.keep) // CACHE_GROWTH) * CACHE_GROWTH - self.length
        if self.keys is None:
            rows, heads, _, width = like.shape
            self.keys = mx.zeros((rows, heads, 0, width), like.dtype)
            self.values = self.keys
        self.keys = _with_room(self.keys[:, :, : self.length], room)
        self.values = _with_room(self.values[:, :, : self.length], room)

    def with_canvas(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The K/V that a canvas attends to: the visible prefix, then the canvas's own [B', heads, L, head_dim].

        B' is the cache's number of rows, or any number where the cache has one row. The prefix stays as it is; the
        written buffers are adopted by `settle`, which lets the next step write into them in place. Until then, another
        as many canvases are written where these were: in place where the graph has those computed first.
        """
        rows, _, count, _ = keys.shape
        base, start = self._base(keys, values, rows)
        end = start + count
        if end > base[0].shape[2]:
            base = tuple(_with_room(array[:, :, :start], count) for array in base)
        all_keys, all_values = _written(base[0], start, keys), _written(base[1], start, values)
        self._canvas = (all_keys, all_values)
        first = start - self.visible
        return all_keys[:, :, first:end], all_values[:, :, first:end]

    def _base(self, keys: mx.array, values: mx.array, rows: int) -> tuple[tuple[mx.array, mx.array], int]:
        """Buffers of `rows` rows to write a canvas into, and where in them the prefix ends."""
        if self.keys is None:
            return (keys[:, :, :0], values[:, :, :0]), 0
        is_spread = self.keys.shape[0] != rows
        if self._canvas is not None and self._canvas[0].shape[0] == rows:
            return self._canvas, self.visible if is_spread else self.length
        if not is_spread:
            return (self.keys, self.values), self.length
        if self._spread is None or self._spread[0].shape[0] != rows:
            prefix = slice(self.length - self.visible, self.length)
            self._spread = tuple(
                _with_room(mx.broadcast_to(a[:, :, prefix], (rows, a.shape[1], self.visible, a.shape[3])), self.keep)
                for a in (self.keys, self.values)
            )
        return self._spread, self.visible

    def settle(self) -> None:
        """Adopt the buffers of the last canvas, whose scratch the next canvas may overwrite."""
        if self._canvas is None or self.keys is None:
            return
        if self._canvas[0].shape[0] == self.keys.shape[0]:
            self.keys, self.values = self._canvas
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
        twin.keys, twin.values, twin.length = self.keys, self.values, self.length
        return twin

    def rows(self, indices: mx.array) -> LayerCache:
        part = self.fork()
        if self.keys is not None and self.values is not None:
            part.keys, part.values = self.keys[indices], self.values[indices]
        return part


class LayerRows:
    """One layer of several caches of one row each: every row attends to its own prefix and canvas."""

    def __init__(self, layers: Sequence[LayerCache]):
        self.layers = layers

    def with_canvas(self, keys: mx.array, values: mx.array) -> tuple[list[mx.array], list[mx.array]]:
        """`LayerCache.with_canvas` of each row of keys and values [B, heads, L, head_dim]."""
        seen = [layer.with_canvas(keys[row : row + 1], values[row : row + 1]) for row, layer in enumerate(self.layers)]
        return [keys for keys, _ in seen], [values for _, values in seen]


def _with_room(array: mx.array, room: int) -> mx.array:
    """`array` [B, heads, N, head_dim] with `room` more positions."""
    return mx.pad(array, [(0, 0), (0, 0), (0, room), (0, 0)])


def _written(buffer: mx.array, start: int, new: mx.array) -> mx.array:
    """`buffer` with `new` at `start`; the caller's array stays what it was. In place where nobody else holds it."""
    target = buffer[:]
    target[:, :, start : start + new.shape[2]] = new
    return target
