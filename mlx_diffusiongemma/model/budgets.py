"""Limits that the model keeps to while it computes: bytes, tokens and canvases that exist at once."""

from __future__ import annotations

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
SLIDING_GROWTH = 64  # what a sliding layer's buffer takes in before older tokens are dropped, which copies the window
GROUP = 32  # tokens whose probabilities are summed before one of them is drawn
BATCH_ROWS = 8  # replies of a batch in flight, unless a caller says how many
TOGETHER = 16  # canvases that infilling compares as one batch
MEMBER_ROWS = 256  # positions whose groups' embeddings exist at once while that one is drawn
PREFILL_CHUNK = 1024  # tokens encoded at once: enough rows for every expert, few enough for a window's scores
