"""The encoded prefix: keys and values of every layer, what they are of, and the way back to earlier prefixes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import mlx.core as mx

from ..config import TextConfig
from ..errors import BusyError
from .layer_cache import LayerCache, LayerRows

SNAPSHOT_BYTES = 320 * 2**20  # that snapshots may take beside the cache: one of the published model's, 327 MB

Block = tuple[int, int]  # first position of an image's tokens, and the one after its last
Label = int | str  # what a token of the prefix is: its id, or the digest of the image it is part of


@dataclass(frozen=True)
class Snapshot:
    """The sliding layers as they were after `offset` tokens. Full layers keep every token: their beginning is their
    past, so that a snapshot costs the same however long the prefix is.
    """

    offset: int
    layers: tuple[LayerCache, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in layer.buffers or ())

    def reach(self, tokens: int) -> int:
        """The longest prefix of at most `tokens` tokens that can be had from here."""
        target = min(tokens, self.offset)
        back = self.offset - target
        return target if all(layer.length - back >= layer.visible_of(target) for layer in self.layers) else 0


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
        self._masks: dict[tuple[int, int, int | None], mx.array] = {}  # of a padded prefix, one for a kind of layer
        # What `filling` has asked about the prefix, and whether replies to it begin with an empty thought.
        self.reply_opening: tuple[tuple[Label, ...], bool] = ((), False)
        self._lock = threading.Lock()

    @property
    def arrays(self) -> list[mx.array]:
        """Every array the prefix consists of."""
        return [array for layer in self.layers for array in layer.buffers or ()]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def positions(self) -> int | mx.array:
        """The next token's position: one for all rows, or of each row [B] where some are padded."""
        return self.offset if self.padding is None else self.offset - mx.array(self.padding)

    def canvas_mask(self, count: int, window: int | None) -> mx.array | None:
        """Booleans for what a canvas of `count` tokens sees of a layer with this window, or None where it sees all that
        the layer keeps: only padding is hidden.
        """
        before = self.offset if window is None else min(self.offset, window - 1)
        first = self.offset - before
        if self.padding is None or first >= max(self.padding):
            return None
        if (found := self._masks.get((self.offset, count, window))) is None:
            keys = mx.arange(first, self.offset + count)
            found = (keys >= mx.array(self.padding)[:, None])[:, None, None]
            self._masks = {key: mask for key, mask in self._masks.items() if key[:2] == (self.offset, count)}
            self._masks[self.offset, count, window] = found
        return found

    def encoder_mask(self, count: int, window: int | None, blocks: Sequence[Block] = ()) -> mx.array | str | None:
        """Say which of the visible tokens each of the next `count` may attend to: itself and those before it, in layers
        with a window at most `window - 1` back; all of its own image, beyond the window too; never padding.

        blocks: the images' tokens among the next ones.
        """
        before = self.offset if window is None else min(self.offset, window - 1)
        if self.padding is None and not blocks and (window is None or before + count <= window):
            return "causal" if count > 1 else None
        queries = mx.arange(self.offset, self.offset + count)[:, None]
        keys = mx.arange(self.offset - before, self.offset + count)[None]
        mask = keys <= queries
        if window is not None:
            mask = mask & (keys > queries - window)
        for first, last in blocks:
            first, last = first + self.offset, last + self.offset
            mask = mask | ((queries >= first) & (queries < last) & (keys >= first) & (keys < last))
        if self.padding is None:
            return mask
        real = keys >= mx.array(self.padding)[:, None, None, None]
        # A padding token sees itself: a row of nothing but -inf would turn into NaN and spread.
        return (mask & real) | (keys == queries)

    def extended(self, count: int) -> None:
        """Take note of `count` more tokens, whose K/V the layers have taken in."""
        self.offset += count

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
            f"layers.{number}.{name}": array[:, :, layer.length - layer.needed_of(layer.length) : layer.length]
            for number, layer in enumerate(self.layers)
            if layer.buffers is not None and layer.length
            for name, array in zip(("keys", "values"), layer.buffers, strict=True)
        }

    def adopt(self, arrays: dict[str, mx.array], labels: list[Label]) -> None:
        """Hold the prefix that `export` gave and nothing else. Raises ValueError where it is not this model's."""
        length = len(labels)
        layers = [LayerCache(layer.window, self.keep) for layer in self.layers]
        for number, (layer, config) in enumerate(zip(layers, self.config.layers, strict=True)):
            if not length:
                break
            keys, values = (arrays.get(f"layers.{number}.{name}") for name in ("keys", "values"))
            if keys is None or values is None or keys.shape != values.shape:
                raise ValueError(f"layer {number} has no keys and values of one shape")
            layer.buffers, layer.length = (keys, values), keys.shape[2] if keys.ndim == 4 else 0
            fewest, most = layer.visible_of(length), layer.needed_of(length)
            expected = (1, config.num_key_value_heads, layer.length, config.head_dim)
            if keys.shape != expected or not fewest <= layer.length <= most:
                raise ValueError(f"layer {number} has keys of shape {list(keys.shape)} for {length} tokens")
        self.layers, self.labels, self.offset = layers, list(labels), length
        self.padding, self.snapshots = None, []

    def rows(self, indices: Sequence[int]) -> Cache:
        """A cache of some of the rows, in this order; the two share nothing that is written to.

        Raises IndexError where there is no such row.
        """
        count = self.arrays[0].shape[0] if self.arrays else 1
        if not indices or not all(0 <= index < count for index in indices):
            raise IndexError(f"this cache has rows 0 to {count - 1}, not {list(indices)}")
        part = Cache(self.config, self.keep, self.snapshot_bytes)
        part.offset = self.offset
        if self.padding and any(self.padding[index] for index in indices):
            part.padding = tuple(self.padding[index] for index in indices)
        part.labels = self.labels[:] if len(indices) == 1 else []
        part.layers = [layer.rows(mx.array(list(indices))) for layer in self.layers]
        part.evaluate()
        return part

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


class CacheRows:
    """Caches of one row each, as one batch: canvases are denoised, and tokens appended, each after its own prefix.

    Nothing is copied or padded to bring rows together, so they can come and go at any step. To encode a prompt, take a
    row's own cache.
    """

    def __init__(self, caches: Sequence[Cache]):
        """Raises ValueError where a cache has padded rows."""
        if any(cache.padding is not None for cache in caches):
            raise ValueError("each cache must be of one row without padding")
        self.caches = tuple(caches)

    @property
    def layers(self) -> list[LayerRows]:
        return [LayerRows(layers) for layers in zip(*(cache.layers for cache in self.caches), strict=True)]

    @property
    def positions(self) -> mx.array:
        """The next token's position in each row, [B]."""
        return mx.array([cache.offset for cache in self.caches])

    def canvas_mask(self, count: int, window: int | None) -> None:
        """No mask: every row sees all that it attends to."""

    def encoder_mask(self, count: int, window: int | None, blocks: Sequence[Block] = ()) -> list[mx.array | str | None]:
        """Each row's own mask. Raises ValueError where there are images."""
        if blocks:
            raise ValueError("images can be encoded in a batch of one row only")
        return [cache.encoder_mask(count, window) for cache in self.caches]

    def extended(self, count: int) -> None:
        for cache in self.caches:
            cache.extended(count)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Append to all of them within this. What is stopped halfway leaves them empty."""
        with ExitStack() as stack:
            for cache in self.caches:
                stack.enter_context(cache.writing())
            yield

    def settle(self) -> None:
        for cache in self.caches:
            cache.settle()

    def release(self) -> None:
        for cache in self.caches:
            cache.release()


def together(caches: Sequence[Cache]) -> Cache | CacheRows:
    """A row for each of these caches, of one row each: the cache itself where there is but one."""
    return caches[0] if all(cache is caches[0] for cache in caches) else CacheRows(caches)
