"""What a model needs, computed from its configuration: bytes to hold it, floating-point operations of a step.

Shapes alone decide; nothing is loaded. Sizes are bytes, `item` is the bytes of one activation (2 in bfloat16).
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import LayerConfig, ModelConfig, TextConfig

CONTEXT = 8192  # tokens of prefix that a checkpoint's needs are quoted at

# What the model keeps to, in bytes.
# A block of the vocabulary: its float32 logits. About ten arrays of this size are alive at once where nothing is fused
# (some are freed only when the next block is under way), and five where one block is all.
BLOCK_BUDGET = 8 * 2**20
BLOCKS_ALIVE, BLOCKS_ALIVE_ALONE = 10, 5
# Scores of one attention call. Head sizes of 256 and 512 have no fused kernel for many queries on most chips, so the
# scores exist; queries are taken in parts that keep them under this.
SCORE_BUDGET = 256 * 2**20
# What canvases that share a prefix may add to one when they are computed at once, each with a copy of what it sees of
# the prefix. A batch gains little where products are limited by arithmetic, as those of a canvas are on most Macs, so
# it gets what a checkpoint that fits with 5 % to spare leaves, from 13 GB on. Rows also hold some 0.1 GB of states.
ROWS_BUDGET = 2**29

# And in tokens, or canvases.
BLOCK_TOKENS = 8192  # of the vocabulary in a block at most
CACHE_GROWTH = 1024  # what a full layer's buffer grows by
GROUP = 32  # tokens whose probabilities are summed before one of them is drawn
TOGETHER = 16  # canvases that infilling compares as one batch
MEMBER_ROWS = 256  # positions whose groups' embeddings exist at once while that one is drawn

SLIDING_ATTENTION, FULL_ATTENTION = "attention, sliding", "attention, full"
CONDITIONING, DENSE, EXPERTS, VOCABULARY = "embedding, self-conditioning", "dense MLP", "router, experts", "vocabulary"


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


def rows_at_once(text: TextConfig, canvas: int, context: int, most: int, item: int = 2) -> int:
    """How many of `most` canvases of so many tokens, after one prefix of `context`, keep to ROWS_BUDGET; at least 1."""
    return max(rows for rows in range(1, most + 1) if rows_bytes(text, canvas, context, rows, item) <= ROWS_BUDGET)


def rows_bytes(text: TextConfig, canvas: int, context: int, rows: int, item: int = 2) -> int:
    """What computing `rows` canvases at once after one prefix takes beyond what one takes: nothing for one, which is
    written behind the prefix itself; for more, each one's copy of the prefix that it sees, one layer's keys once more,
    which attention copies in passing, and the larger step.
    """
    if rows == 1:
        return 0
    keys = [
        item * layer.num_key_value_heads * layer.head_dim * (_visible(layer, text, context) + canvas)
        for layer in text.layers
    ]
    step = _step_bytes(text, rows, canvas, context, item) - _step_bytes(text, 1, canvas, context, item)
    return rows * (2 * sum(keys) + max(keys)) + step


def snapshot_bytes(config: ModelConfig, context: int, item: int = 2) -> int:
    """Of a kept cache's way back to an earlier prompt: what its sliding layers held then, beside what they hold now."""
    return sum(
        2 * item * layer.num_key_value_heads * layer.head_dim * _capacity(layer, config, context)
        for layer in config.text.layers
        if layer.is_sliding
    )


def _step_bytes(text: TextConfig, rows: int, canvas: int, context: int, item: int) -> int:
    """Of `rows` canvases at once."""
    tokens = rows * canvas
    return max(
        _attention_bytes(text, tokens, context + canvas, item),
        item * tokens * text.top_k_experts * (2 * text.hidden_size + 3 * text.moe_intermediate_size),
        _vocabulary_bytes(text, tokens, item),
    )


def _visible(layer: LayerConfig, text: TextConfig, context: int) -> int:
    """Tokens of the prefix that a canvas sees."""
    return min(context, text.sliding_window - 1) if layer.is_sliding else context


def _capacity(layer: LayerConfig, config: ModelConfig, context: int) -> int:
    """Tokens that a layer's buffers have room for."""
    canvas = config.canvas_length
    if layer.is_sliding:
        return min(context, config.text.sliding_window - 1 + canvas) + canvas
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


def step_operations(config: ModelConfig, context: int) -> dict[str, dict[str, int]]:
    """Floating-point operations of one step by component, and there by the kind of product (a ceiling's name)."""
    text, rows = config.text, config.canvas_length
    gated = 2 * rows * 3 * text.hidden_size
    head = 2 * rows * text.hidden_size * text.vocab_size
    layers = len(text.layers)
    routing = 2 * rows * text.hidden_size * text.num_experts * layers
    attention: dict[str, dict[str, int]] = {}
    for layer in text.layers:
        sums = attention.setdefault(SLIDING_ATTENTION if layer.is_sliding else FULL_ATTENTION, {})
        for kind, count in _attention_operations(layer, text, rows, context).items():
            sums[kind] = sums.get(kind, 0) + count
    return {
        CONDITIONING: {"product": gated * text.intermediate_size},
        **attention,
        DENSE: {"product": gated * text.intermediate_size * layers},
        EXPERTS: {
            "product": routing,
            "experts": gated * text.moe_intermediate_size * text.top_k_experts * layers,
        },
        VOCABULARY: {"product": head, "product, plain": head},
    }


def _attention_operations(layer: LayerConfig, text: TextConfig, rows: int, context: int) -> dict[str, int]:
    queries = text.num_attention_heads * layer.head_dim
    keys = layer.num_key_value_heads * layer.head_dim * (2 if layer.is_sliding else 1)
    seen = _visible(layer, text, context)
    scores = "attention, sliding" if layer.is_sliding else "attention, full"
    return {
        "product": 2 * rows * text.hidden_size * (2 * queries + keys),
        scores: 4 * rows * queries * (seen + rows),
    }
