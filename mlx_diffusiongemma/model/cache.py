"""Keys and values of the encoded prefix, kept per layer.

Every layer holds one buffer with room past the prefix: a canvas's keys and values are written there in place, so that
a denoising step neither concatenates nor copies the prefix. What lies past the prefix is scratch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from ..config import TextConfig
from ..errors import BusyError
from .budgets import CACHE_GROWTH

SNAPSHOT_BYTES = 320 * 2**20  # that snapshots may take beside the cache: one of the published model's, 314 MB

Label = int | str  # what a token of the prefix is: its id, or the digest of the image it is part of


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


@dataclass(frozen=True)
class Snapshot:
    """The sliding layers as they were after `offset` tokens. Full layers keep every token: their beginning is their
    past, so that a snapshot costs the same however long the prefix is.
    """

    offset: int
    layers: tuple[LayerCache, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.keys is not None)

    def reach(self, tokens: int) -> int:
        """The longest prefix of at most `tokens` tokens that can be had from here."""
        target = min(tokens, self.offset)
        back = self.offset - target
        return target if all(layer.length - back >= min(target, layer.window - 1) for layer in self.layers) else 0


class Cache:
    """The encoded prefix of a batch of B rows, which can go back to what it was.

    offset: tokens encoded so far, padding included. padding: per row, how many of the first tokens are padding
    (a ragged batch is aligned at its end), or None. labels: what each token is, where there is one row without
    padding, and nothing for any other. snapshot_bytes: what snapshots may take; the oldest are dropped.
    """

    def __init__(self, config: TextConfig, keep: int, snapshot_bytes: int = SNAPSHOT_BYTES):
        self.config = config
        self.keep = keep
        self.snapshot_bytes = snapshot_bytes
        self.offset = 0
        self.padding: tuple[int, ...] | None = None
        self.labels: list[Label] = []
        self.snapshots: list[Snapshot] = []
        self.layers = [LayerCache(config.sliding_window if layer.is_sliding else None, keep) for layer in config.layers]
        self._lock = threading.Lock()

    @property
    def arrays(self) -> list[mx.array]:
        """Every array the prefix consists of."""
        return [array for layer in self.layers for array in (layer.keys, layer.values) if array is not None]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def evaluate(self) -> None:
        """Compute what is still lazy, so that the cache can go to another thread."""
        mx.eval(self.arrays)

    def fork(self) -> Cache:
        """A copy that can go its own way. The two share memory until one of them is written to."""
        twin = Cache(self.config, self.keep, self.snapshot_bytes)
        twin.offset, twin.padding = self.offset, self.padding
        twin.labels, twin.snapshots = self.labels[:], self.snapshots[:]
        twin.layers = [layer.fork() for layer in self.layers]
        return twin

    def snapshot(self) -> None:
        """Make the prefix as it is now one that `rewind` can go back to, whatever is encoded after it."""
        if any(snapshot.offset == self.offset for snapshot in self.snapshots):
            return
        self.evaluate()
        self.snapshots.append(self._now())
        while sum(snapshot.nbytes for snapshot in self.snapshots) > self.snapshot_bytes:
            self.snapshots.pop(0)

    def rewind(self, tokens: int) -> int:
        """Go back to the longest prefix of at most `tokens` tokens that layers and snapshots still have; its length.

        Exact wherever it gets to: the next tokens see what they would after a prompt that ended there.
        """
        states = [self._now(), *self.snapshots]
        nearest = max(states, key=lambda state: state.reach(tokens))
        self._return_to(nearest, nearest.reach(tokens))
        return self.offset

    def trim(self, tokens: int) -> None:
        """Forget the last `tokens` tokens. Raises ValueError where a sliding layer no longer has what comes before.

        Up to the model's canvas length is always possible, and any number while nothing has left the window.
        """
        left, now = self.offset - tokens, self._now()
        if not 0 <= tokens <= self.offset:
            raise ValueError(f"cannot trim {tokens} tokens of {self.offset}")
        if now.reach(left) != left:
            raise ValueError(f"cannot trim {tokens} tokens: sliding layers keep a window and {self.keep} tokens")
        self._return_to(now, left)

    def export(self) -> dict[str, mx.array]:
        """The prefix's keys and values by name, [B, heads, tokens, head_dim] each: what `adopt` takes."""
        return {
            f"layers.{number}.{name}": array[:, :, : layer.length]
            for number, layer in enumerate(self.layers)
            for name, array in (("keys", layer.keys), ("values", layer.values))
            if layer.length
        }

    def adopt(self, arrays: dict[str, mx.array], labels: list[Label]) -> None:
        """Hold the prefix that `export` gave and nothing else. Raises ValueError where it is not this model's."""
        length = len(labels)
        layers = [LayerCache(layer.window, self.keep) for layer in self.layers]
        for number, (layer, config) in enumerate(zip(layers, self.config.layers, strict=True)):
            if not length:
                break
            layer.keys, layer.values = (arrays.get(f"layers.{number}.{name}") for name in ("keys", "values"))
            if layer.keys is None or layer.values is None or layer.keys.shape != layer.values.shape:
                raise ValueError(f"layer {number} has no keys and values of one shape")
            layer.length = layer.keys.shape[2] if layer.keys.ndim == 4 else 0
            fewest = length if layer.window is None else min(length, layer.window - 1)
            most = length if layer.window is None else min(length, layer.window - 1 + self.keep)
            expected = (1, config.num_key_value_heads, layer.length, config.head_dim)
            if layer.keys.shape != expected or not fewest <= layer.length <= most:
                raise ValueError(f"layer {number} has keys of shape {list(layer.keys.shape)} for {length} tokens")
        self.layers, self.labels, self.offset = layers, list(labels), length
        self.padding, self.snapshots = None, []

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Held by one request within this. Raises BusyError where another has it."""
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "This cache is in use by another request; let that one end or close its events, or give each its own."
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Encode within this. What is stopped halfway leaves nothing: full layers' buffers wait for the chunk that
        failed, which another thread could not even compute.
        """
        try:
            yield
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Hold nothing."""
        self.layers = [LayerCache(layer.window, self.keep) for layer in self.layers]
        self.offset, self.padding, self.labels, self.snapshots = 0, None, [], []

    def settle(self) -> None:
        """Let the next canvas be written in place of the last one. Call it when that one is not needed again."""
        for layer in self.layers:
            layer.settle()

    def release(self) -> None:
        """Free what the last canvas held beside the prefix."""
        for layer in self.layers:
            layer.release()

    def _now(self) -> Snapshot:
        return Snapshot(self.offset, tuple(layer.fork() for layer in self.layers if layer.window is not None))

    def _return_to(self, snapshot: Snapshot, tokens: int) -> None:
        """Become the first `tokens` tokens, which `snapshot` reaches."""
        sliding = iter(snapshot.layers)
        self.layers = [layer if layer.window is None else next(sliding).fork() for layer in self.layers]
        for layer in self.layers:
            lost = layer.length - tokens if layer.window is None else snapshot.offset - tokens
            layer.trim(min(lost, layer.length))
        self.offset = tokens
        self.padding = self.padding if tokens else None
        del self.labels[tokens:]
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.offset <= tokens]


def _with_room(array: mx.array, room: int) -> mx.array:
    """`array` [B, heads, N, head_dim] with `room` more positions."""
    return mx.pad(array, [(0, 0), (0, 0), (0, room), (0, 0)])


def _written(buffer: mx.array, start: int, new: mx.array) -> mx.array:
    """`buffer` with `new` at `start`; the caller's array stays what it was. In place where nobody else holds it."""
    target = buffer[:]
    target[:, :, start : start + new.shape[2]] = new
    return target
