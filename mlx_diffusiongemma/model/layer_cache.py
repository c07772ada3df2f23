"""One layer's keys and values of the encoded prefix.

A layer holds one buffer with room past the prefix: a canvas's keys and values are written there in place, so that a
denoising step neither concatenates nor copies the prefix, and so are the next few tokens of the prefix itself. What
lies past the prefix is scratch.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .budgets import CACHE_GROWTH, SLIDING_GROWTH

KeysValues = tuple[mx.array, mx.array]  # [B, heads, N, head_dim] each
Places = tuple[mx.array, int]  # some positions of a canvas, int32 [B, F], and the length of that canvas


class LayerCache:
    """One layer's keys and values; the first `length` positions of its `buffers` are the prefix.

    buffers: [B, heads, capacity, head_dim] each, or None before anything is encoded.
    With a `window`, the last `window - 1 + keep` tokens stay, which is what a later token or a rewind of `keep` needs,
    and up to SLIDING_GROWTH more that have not been dropped yet.
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

    def needed_of(self, tokens: int) -> int:
        """The number of the last of `tokens` tokens that stay: what is seen after a rewind of `keep` of them."""
        return tokens if self.window is None else min(tokens, self.window - 1 + self.keep)

    def append(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Take the next tokens' K/V [B, heads, N, head_dim] in; returns those that they can see, themselves last."""
        self._canvas = self._spread = None
        start, seen = self.length, self.visible + keys.shape[2]
        end = start + keys.shape[2]
        if self.buffers is not None and end + self.keep <= self.buffers[0].shape[2]:
            self.buffers, self.length = _both_written(self.buffers, start, (keys, values)), end
        elif self.window is None:
            self.buffers, self.length = _both_written(self._grown(keys, values), start, (keys, values)), end
        else:
            return self._append_and_drop(keys, values, seen)
        all_keys, all_values = self.buffers
        return all_keys[:, :, end - seen : end], all_values[:, :, end - seen : end]

    def _append_and_drop(self, keys: mx.array, values: mx.array, seen: int) -> KeysValues:
        """`append` where a sliding layer has no room: what is not needed any more goes, in buffers with new room."""
        if self.buffers is not None and self.length:
            old_keys, old_values = (array[:, :, : self.length] for array in self.buffers)
            keys, values = mx.concatenate([old_keys, keys], axis=2), mx.concatenate([old_values, values], axis=2)
        self.length = self.needed_of(keys.shape[2])
        room = SLIDING_GROWTH + self.keep
        self.buffers = _with_room(keys[:, :, -self.length :], room), _with_room(values[:, :, -self.length :], room)
        # Whoever computes what is seen computes the buffers too: nothing lazy is left for another thread.
        seen_keys, seen_values = mx.depends([keys[:, :, -seen:], values[:, :, -seen:]], list(self.buffers))
        return seen_keys, seen_values

    def _grown(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Larger buffers with the prefix in them, and room for more K/V like these and a canvas."""
        room = -(-(self.length + keys.shape[2] + self.keep) // CACHE_GROWTH) * CACHE_GROWTH - self.length
        if self.buffers is None:
            return _with_room(keys[:, :, :0], room), _with_room(values[:, :, :0], room)
        old_keys, old_values = self.buffers
        return _with_room(old_keys[:, :, : self.length], room), _with_room(old_values[:, :, : self.length], room)

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
        self._canvas = all_keys, all_values = _both_written((old_keys, old_values), start, (keys, values))
        first = start - self.visible
        return all_keys[:, :, first:end], all_values[:, :, first:end]

    def with_part_of_canvas(self, keys: mx.array, values: mx.array, places: Places) -> KeysValues:
        """The K/V that a canvas attends to, of which only those at `places` [1, heads, F, head_dim] are new.

        All others are those that `settle` adopted last. Raises ValueError where the cache is not of one row, or empty.
        """
        index, length = places
        end = self.length + length
        if self.buffers is None or self.buffers[0].shape[0] != 1:
            raise ValueError("part of a canvas can only be written behind a prefix of one row")
        old_keys, old_values = self.buffers
        if old_keys.shape[2] < end:
            old_keys, old_values = (_with_room(array[:, :, : self.length], length) for array in self.buffers)
        at = self.length + index[0]
        written = _written_at(old_keys, at, keys), _written_at(old_values, at, values)
        self._canvas = written
        first = self.length - self.visible
        return written[0][:, :, first:end], written[1][:, :, first:end]

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

    def append(self, keys: mx.array, values: mx.array) -> list[KeysValues]:
        """Take in each row's next tokens, of a batch's own [B, heads, N, head_dim]; the K/V that each row's can see."""
        return [layer.append(keys[row : row + 1], values[row : row + 1]) for row, layer in enumerate(self.layers)]

    def with_canvas(self, keys: mx.array, values: mx.array) -> list[KeysValues]:
        """The K/V that each row's canvas attends to, for a batch's own [B, heads, L, head_dim]."""
        return [layer.with_canvas(keys[row : row + 1], values[row : row + 1]) for row, layer in enumerate(self.layers)]

    def with_part_of_canvas(self, keys: mx.array, values: mx.array, places: Places) -> list[KeysValues]:
        """The K/V that each row's canvas attends to, of which those at `places` are new."""
        index, length = places
        rows = [slice(row, row + 1) for row in range(len(self.layers))]
        return [
            layer.with_part_of_canvas(keys[row], values[row], (index[row], length))
            for row, layer in zip(rows, self.layers, strict=True)
        ]


def _with_room(array: mx.array, room: int) -> mx.array:
    """`array` [B, heads, N, head_dim] with `room` more positions."""
    return mx.pad(array, [(0, 0), (0, 0), (0, room), (0, 0)])


def _both_written(buffers: KeysValues, start: int, new: KeysValues) -> KeysValues:
    return _written(buffers[0], start, new[0]), _written(buffers[1], start, new[1])


def _written(buffer: mx.array, start: int, new: mx.array) -> mx.array:
    """`buffer` with `new` at `start`; the caller's array stays what it was. In place where nobody else holds it."""
    target = buffer[:]
    target[:, :, start : start + new.shape[2]] = new
    return target


def _written_at(buffer: mx.array, at: mx.array, new: mx.array) -> mx.array:
    """`buffer` with `new` at the positions `at` [F]; in place where nobody else holds it."""
    return mx.put_along_axis(buffer, at[None, None, :, None], new, axis=2)
