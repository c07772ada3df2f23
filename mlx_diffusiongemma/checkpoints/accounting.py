"""The memory that a model needs, computed from its configuration: for its weights, a prefix and a step.

Shapes alone decide; nothing is loaded. Sizes are bytes, `item` is the bytes of one activation (2 in bfloat16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import LayerConfig, ModelConfig, TextConfig
from ..model.budgets import (
    BLOCK_BUDGET,
    BLOCK_TOKENS,
    BLOCKS_ALIVE,
    BLOCKS_ALIVE_ALONE,
    CACHE_GROWTH,
    GROUP,
    MEMBER_ROWS,
    PREFILL_CHUNK,
    ROWS_BUDGET,
    SCORE_BUDGET,
    SLIDING_GROWTH,
    TOGETHER,
)

if TYPE_CHECKING:
    from ..model.cache import Cache

CONTEXT = 8192  # tokens of prefix that a checkpoint's needs are quoted at


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights, of a prefix's keys and values, and of what one denoising step adds at its peak.

    Beside them, `snapshot` is what a chat, or any cache that is kept, holds to go back to an earlier prompt; `rows`
    what infilling adds, which denoises several canvases at once.
    """

    weights: int
    cache: int
    step: int
    snapshot: int
    rows: int

    @property
    def total(self) -> int:
        """To answer a prompt."""
        return self.weights + self.cache + self.step


def memory_needed(config: ModelConfig, weights: int, context: int = CONTEXT, item: int = 2) -> Memory:
    """To denoise a canvas after `context` tokens. weights: bytes of the tensors, see `ModelConfig` for the rest."""
    text, canvas = config.text, config.canvas_length
    return Memory(
        weights,
        cache_bytes(config, context, item),
        step_bytes(config, context, item),
        snapshot_bytes(config, context, item),
        rows_bytes(text, canvas, context, rows_at_once(text, canvas, context, TOGETHER, item), item),
    )


def cache_bytes(config: ModelConfig, context: int, item: int = 2) -> int:
    """Keys and values of `context` tokens, with the room that a canvas and growing need."""
    return sum(
        2 * item * layer.num_key_value_heads * layer.head_dim * _capacity(layer, config, context)
        for layer in config.text.layers
    )


def step_bytes(config: ModelConfig, context: int, item: int = 2) -> int:
    """The largest of what attention, the experts and the vocabulary hold at once."""
    return _step_bytes(config.text, 1, config.canvas_length, context, item)


def batch_bytes(config: ModelConfig, caches: Sequence[int], longest: int, item: int = 2) -> int:
    """Add up several replies in flight, beside the weights: each one's cache, a step of all canvases together, and the
    chunk of a newcomer's prompt that is encoded meanwhile.

    caches: each reply's `cache_bytes`, of the most tokens that it will follow. longest: the most of any.
    """
    step = _step_bytes(config.text, len(caches), config.canvas_length, longest, item)
    chunk = _layer_bytes(config.text, PREFILL_CHUNK, longest, item)
    return sum(caches) + step + chunk


def rows_at_once(text: TextConfig, canvas: int, context: int, most: int, item: int = 2) -> int:
    """The number of canvases, 1 to `most`, that fit in ROWS_BUDGET: of `canvas` tokens, after a prefix of `context`."""
    return max(rows for rows in range(1, most + 1) if rows_bytes(text, canvas, context, rows, item) <= ROWS_BUDGET)


def rows_after(cache: Cache, most: int) -> int:
    """The number of canvases, 1 to `most`, that ROWS_BUDGET lets be computed at once after the prefix in `cache`."""
    item = max((array.itemsize for array in cache.arrays), default=2)
    return rows_at_once(cache.config, cache.keep, cache.offset, most, item)


def rows_bytes(text: TextConfig, canvas: int, context: int, rows: int, item: int = 2) -> int:
    """Bytes that computing `rows` canvases at once after one prefix takes beyond what one canvas takes.

    Nothing for one, which is written behind the prefix itself; for more, each one's copy of the prefix that it sees,
    one layer's keys once more, which attention copies in passing, and the larger step.
    """
    if rows == 1:
        return 0
    keys = [
        item * layer.num_key_value_heads * layer.head_dim * (visible_tokens(layer, text, context) + canvas)
        for layer in text.layers
    ]
    step = _step_bytes(text, rows, canvas, context, item) - _step_bytes(text, 1, canvas, context, item)
    return rows * (2 * sum(keys) + max(keys)) + step


def snapshot_bytes(config: ModelConfig, context: int, item: int = 2) -> int:
    """Bytes of a kept cache's way back to an earlier prompt: what its sliding layers held then, beside those of now."""
    return sum(
        2 * item * layer.num_key_value_heads * layer.head_dim * _capacity(layer, config, context)
        for layer in config.text.layers
        if layer.is_sliding
    )


def _step_bytes(text: TextConfig, rows: int, canvas: int, context: int, item: int) -> int:
    """Of `rows` canvases at once."""
    tokens = rows * canvas
    return max(_layer_bytes(text, tokens, context + canvas, item), _vocabulary_bytes(text, tokens, item))


def _layer_bytes(text: TextConfig, tokens: int, keys: int, item: int) -> int:
    """The most that a layer holds while it computes so many tokens: in attention, or in its experts."""
    experts = item * tokens * text.top_k_experts * (2 * text.hidden_size + 3 * text.moe_intermediate_size)
    return max(_attention_bytes(text, tokens, keys, item), experts)


def visible_tokens(layer: LayerConfig, text: TextConfig, context: int) -> int:
    """Tokens of the prefix that a canvas sees."""
    return min(context, text.sliding_window - 1) if layer.is_sliding else context


def _capacity(layer: LayerConfig, config: ModelConfig, context: int) -> int:
    """Tokens that a layer's buffers have room for."""
    canvas = config.canvas_length
    if layer.is_sliding:
        return min(context, config.text.sliding_window - 1 + canvas) + SLIDING_GROWTH + canvas
    return -(-(context + canvas) // CACHE_GROWTH) * CACHE_GROWTH


def _attention_bytes(text: TextConfig, rows: int, keys: int, item: int) -> int:
    """Of the widest layer: queries, keys and values, the result, and before and after softmax the scores."""
    widths = [text.num_attention_heads * layer.head_dim for layer in text.layers]
    scores = min(text.num_attention_heads * rows * keys, SCORE_BUDGET // 4)
    return 2 * item * scores + 4 * item * rows * max(widths)


def _vocabulary_bytes(text: TextConfig, rows: int, item: int) -> int:
    """A block's arrays and a copy of its embeddings, which a CPU makes of plain ones; then the candidates among which
    each position draws. The groups' masses all along.
    """
    masses = 4 * rows * -(-text.vocab_size // GROUP)
    whole = 4 * rows * text.vocab_size
    block = min(BLOCK_BUDGET, 4 * rows * BLOCK_TOKENS)
    blocks = BLOCKS_ALIVE * block if whole > block else BLOCKS_ALIVE_ALONE * whole
    candidates = item * min(rows, MEMBER_ROWS) * GROUP * text.hidden_size
    copy = item * text.hidden_size * (block // (4 * rows) if whole > block else text.vocab_size)
    return masses + max(blocks + copy, 2 * candidates + masses)
