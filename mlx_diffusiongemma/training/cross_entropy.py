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
    neither quantized nor frozen.
    """

    def table(weight: list[mx.array]) -> Embedding:
        """The embedding, with the weight that gradients are taken of."""
        if not weight:
            return embedding
        own = nn.Embedding(1, 1)
        (own.weight,) = weight
        return own

    @mx.custom_function
    def computed(hidden: mx.array, targets: mx.array, *weight: mx.array) -> tuple[mx.array, mx.array]:
        log_total = vocabulary.log_total(table([*weight]), hidden, cap)
        return log_total - vocabulary.logits_of(table([*weight]), hidden, targets, cap), log_total

    @computed.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
    ) -> tuple[mx.array, ...]:
        hidden, targets, *weight = primals
        to_hidden, *to_weight = _gradients(
            table(weight), hidden, targets, outputs[1], cotangents[0], cap, is_trained=bool(weight)
        )
        return to_hidden, mx.zeros_like(targets), *to_weight

    is_trained = isinstance(embedding, nn.Embedding) and bool(embedding.trainable_parameters())
    losses, _ = cast(tuple[mx.array, mx.array], computed(hidden, targets, *([embedding.weight] if is_trained else [])))
    return losses


def _gradients(
    embedding: Embedding,
    hidden: mx.array,
    targets: mx.array,
    log_total: mx.array,
    weights: mx.array,
    cap: float,
    *,
    is_trained: bool,
) -> list[mx.array]:
    """Gradients of the sum of `weights` [rows] times the losses: with respect to `hidden`, and to the embedding's
    weight where that is trained.
    """
    to_hidden, to_weight = mx.zeros(hidden.shape, mx.float32), list[mx.array]()
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
        if is_trained:
            to_weight.append(slope.T @ hidden)
        # One block after the other, with all that needs its slopes: else all of them would be alive at once.
        rows = mx.depends(rows, [to_hidden, *to_weight[-1:]])
        start += count
    return [to_hidden.astype(hidden.dtype), *([mx.concatenate(to_weight)] if is_trained else [])]
