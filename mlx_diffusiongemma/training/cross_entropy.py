"""Cross-entropy over a large vocabulary, in blocks: no array of tokens x vocabulary exists, forward or backward.

The blocks' logits are computed again for the gradient (Cut Cross-Entropy, arXiv 2411.09009).
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..model import vocabulary
from ..model.vocabulary import Embedding


def cross_entropy(embedding: Embedding, hidden: mx.array, targets: mx.array, cap: float) -> mx.array:
    """The cross-entropy of each target under soft-capped logits, in nats: [rows] float32.

    hidden: [rows, H]; targets: [rows] token ids. Gradients go to `hidden`, and to the embedding's weight where that is
    not quantized.
    """
    plain = isinstance(embedding, nn.Embedding)

    def with_weight(weight: mx.array | None) -> Embedding:
        if weight is None:
            return embedding
        own = nn.Embedding(1, 1)
        own.weight = weight
        return own

    @mx.custom_function
    def computed(hidden: mx.array, targets: mx.array, *weight: mx.array) -> tuple[mx.array, mx.array]:
        table = with_weight(*weight) if weight else embedding
        log_total = vocabulary.log_total(table, hidden, cap)
        return log_total - vocabulary.logits_of(table, hidden, targets, cap), log_total

    @computed.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
    ) -> tuple[mx.array, ...]:
        hidden, targets, *weight = primals
        table = with_weight(*weight) if weight else embedding
        gradients = _gradients(table, hidden, targets, outputs[1], cotangents[0], cap)
        to_hidden, to_weight = gradients
        return to_hidden, mx.zeros_like(targets), *([to_weight] if weight else [])

    arguments = (hidden, targets, embedding.weight) if plain else (hidden, targets)
    losses, _ = cast(tuple[mx.array, mx.array], computed(*arguments))
    return losses


def _gradients(
    embedding: Embedding, hidden: mx.array, targets: mx.array, log_total: mx.array, weights: mx.array, cap: float
) -> tuple[mx.array, mx.array]:
    """Gradients of the sum of `weights` [rows] times the losses: with respect to `hidden` and to the embedding."""
    to_hidden, to_blocks = mx.zeros(hidden.shape, mx.float32), []
    rows = hidden
    start = 0
    for block in vocabulary.embedding_blocks(embedding, vocabulary.block_length(len(rows), len(embedding.weight))):
        count = len(block.weight)
        # d loss / d logit is p - 1 at the target and p elsewhere, and the soft cap's slope is 1 - tanh².
        bent = mx.tanh(vocabulary.raw_logits(block, rows).astype(mx.float32) / cap)
        is_target = targets[:, None] == mx.arange(start, start + count)
        slope = (mx.exp(cap * bent - log_total[:, None]) - is_target) * weights[:, None] * (1 - bent * bent)
        slope = slope.astype(hidden.dtype)
        to_hidden = to_hidden + vocabulary.expected_embedding(block, slope)
        to_blocks.append(slope.T @ hidden)
        rows = mx.depends(rows, to_hidden)  # one block after the other, or all would be alive at once
        start += count
    return to_hidden.astype(hidden.dtype), mx.concatenate(to_blocks)
