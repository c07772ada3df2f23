"""The vocabulary side of a step: what the hidden states say about every token.

`logits` and `soft_embedding` are the definition. `read` computes the same in one pass over blocks of the embedding,
as flash attention does over keys: with running maxima and sums, no array of canvas x vocabulary ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .budgets import BLOCK_BUDGET, BLOCK_TOKENS, GROUP, MEMBER_ROWS
from .layer_cache import Places
from .layers import fuse_elementwise

Embedding = nn.Embedding | nn.QuantizedEmbedding


class Reading(NamedTuple):
    """The result of one pass over the vocabulary, for every position of the canvas.

    tokens [B, L]: argmax. sample [B, L]: one draw per position. entropy [B, L]: nats, float32. soft_embedding
    [B, L, hidden]: the expected embedding. `sample` and `soft_embedding` are None where they were not asked for.
    log_total [B, L]: what processed logits are above the log probabilities, float32; None where nobody computed it.
    """

    tokens: mx.array
    sample: mx.array | None
    entropy: mx.array
    soft_embedding: mx.array | None
    log_total: mx.array | None = None


def embedding_rows(embedding: Embedding, index: mx.array) -> Embedding:
    """The embedding of some tokens, as an embedding."""
    part = copy(embedding)
    for name, array in embedding.parameters().items():
        part[name] = mx.contiguous(array[index])
    return part


def embedding_blocks(embedding: Embedding, length: int) -> Iterator[Embedding]:
    """The embedding in blocks of `length` tokens, each an embedding: views of its arrays, which copy nothing."""
    arrays = embedding.parameters()
    for start in range(0, embedding.weight.shape[0], length):
        block = copy(embedding)
        block.update({name: array[start : start + length] for name, array in arrays.items()})
        yield block


def embedding_scale(embedding: Embedding, hidden_size: int) -> mx.array:
    """The factor that embeddings are multiplied by: sqrt(hidden), rounded to their dtype as the reference rounds it."""
    return mx.array(math.sqrt(hidden_size), embedding_dtype(embedding))


def embedding_dtype(embedding: Embedding) -> mx.Dtype:
    """The dtype of embedded tokens. Scales of other modes than affine are codes, and give bfloat16."""
    if isinstance(embedding, nn.Embedding):
        return embedding.weight.dtype
    return embedding.scales.dtype if embedding.mode == "affine" else mx.bfloat16


def expected_embedding(embedding: Embedding, probabilities: mx.array) -> mx.array:
    """The mean of all embeddings, weighted by probabilities [..., V]: [..., hidden], in the embedding's dtype."""
    probabilities = probabilities.astype(embedding_dtype(embedding))
    if isinstance(embedding, nn.Embedding):
        return probabilities @ embedding.weight
    return mx.quantized_matmul(
        probabilities,
        embedding.weight,
        embedding.scales,
        embedding.get("biases"),
        transpose=False,
        group_size=embedding.group_size,
        bits=embedding.bits,
        mode=embedding.mode,
    )


def logits(embedding: Embedding, hidden: mx.array, cap: float) -> mx.array:
    """Every token's logit, soft-capped, for hidden [..., hidden]: [..., V] float32.

    The product is in the model's dtype, the rest in float32.
    """
    return _capped(embedding.as_linear(hidden), mx.array(cap))


def logits_of(embedding: Embedding, hidden: mx.array, tokens: mx.array, cap: float) -> mx.array:
    """The soft-capped logits of one token each, tokens [...], for hidden [..., hidden]: [...] float32."""
    vectors = embedding(tokens.flatten()).reshape(hidden.shape)
    return _capped((vectors[..., None, :] @ hidden[..., None])[..., 0, 0], mx.array(cap))


def soft_embedding(embedding: Embedding, processed_logits: mx.array) -> mx.array:
    """The embedding that processed_logits [..., V] lead to expect: [..., hidden], unscaled.

    The reference casts the logits to the embedding's dtype first; in bfloat16 that cast is only noise, so the
    probabilities stay float32 up to the product. In float32 both are the same.
    """
    return expected_embedding(embedding, mx.softmax(processed_logits.astype(mx.float32), axis=-1))


@fuse_elementwise
def _capped(raw: mx.array, cap: mx.array) -> mx.array:
    return mx.tanh(raw.astype(mx.float32) / cap) * cap


@fuse_elementwise
def _process(raw: mx.array, cap: mx.array, temperature: mx.array) -> mx.array:
    return mx.tanh(raw.astype(mx.float32) / cap) * (cap / temperature)


@fuse_elementwise
def _exponentials(scaled: mx.array, top: mx.array) -> tuple[mx.array, mx.array]:
    """exp(x - top), and that times (x - top)."""
    shifted = scaled - top
    weights = mx.exp(shifted)
    return weights, weights * shifted


@fuse_elementwise
def _higher(
    top: mx.array, tokens: mx.array, block_top: mx.array, block_tokens: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The higher maximum of each row, the first token that has it, and by how much the old one lies below it."""
    joined = mx.maximum(top, block_top)
    return joined, mx.where(block_top > top, block_tokens, tokens), top - joined


@fuse_elementwise
def _joined_sums(
    mass: mx.array, moment: mx.array, old_mass: mx.array, old_moment: mx.array, fall: mx.array
) -> tuple[mx.array, mx.array]:
    """Sums that are relative to a new maximum, with the old ones, which are relative to one lower by `fall`."""
    decay = mx.exp(fall)
    # The moment is of x - top: when the top rises, every x already counted moves by the difference.
    return mass + decay * old_mass, moment + decay * (old_moment + fall * old_mass)


@fuse_elementwise
def _joined_soft(soft: mx.array, old_soft: mx.array, fall: mx.array) -> mx.array:
    return soft.astype(mx.float32) + mx.exp(fall) * old_soft


@fuse_elementwise
def _rescaled(weights: mx.array, top: mx.array, final_top: mx.array) -> mx.array:
    return weights * mx.exp(top - final_top)


def block_length(rows: int, vocabulary: int) -> int:
    """Tokens per block: a multiple of GROUP, at most BLOCK_TOKENS, that keeps one float32 block of `rows` within
    BLOCK_BUDGET.
    """
    fitting = min(BLOCK_BUDGET // (4 * rows) // GROUP * GROUP, BLOCK_TOKENS)
    return min(max(fitting, GROUP), -(-vocabulary // GROUP) * GROUP)


def read(
    embedding: Embedding,
    hidden: mx.array,
    cap: float,
    temperature: float | mx.array,
    key: mx.array | None,
    places: Places | None = None,
    condition: bool | None = None,
) -> Reading:
    """One pass over the vocabulary for hidden [B, L, hidden], at `temperature` (> 0), one or of each row [B].

    key: a PRNG key [2] for all rows, or one per row [B, 2]; None draws nothing. places: where in a canvas the L
    positions are, if they are only some of it: then each draws what it draws in the whole canvas. condition: whether to
    compute the soft embedding, here unscaled, for a next step; None is where something is drawn.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    vocabulary = embedding.weight.shape[0]
    length = block_length(rows.shape[0], vocabulary)
    bound, divisor = mx.array(cap), mx.array(temperature, mx.float32)
    if divisor.ndim:
        divisor = mx.repeat(divisor, hidden.shape[1])[:, None]
    total = _Total(draw=key is not None, condition=key is not None if condition is None else condition)
    for number, block in enumerate(embedding_blocks(embedding, length)):
        start = number * length
        total.add(block, _process(raw_logits(block, rows), bound, divisor), start)
        # One block after the other: evaluated together, all blocks would be alive at once.
        rows = mx.depends(rows, total.state)
    shape, sums = hidden.shape[:-1], total.sums
    assert sums is not None  # a vocabulary has at least one block
    tokens, entropy, log_total = (array.reshape(shape) for array in (sums.tokens, sums.entropy, sums.log_total))
    soft = None if sums.soft is None else (sums.soft / sums.mass).reshape(hidden.shape)
    if key is None:
        return Reading(tokens, None, entropy, soft, log_total)
    uniforms = _uniforms(key, shape, places).reshape(2, -1)
    group = _pick(total.group_masses(sums.top), uniforms[0])
    sample = group * GROUP + _pick(_member_weights(embedding, rows, group, bound, divisor), uniforms[1])
    return Reading(tokens, sample.reshape(shape), entropy, soft, log_total)


def log_total(embedding: Embedding, hidden: mx.array, cap: float) -> mx.array:
    """The logarithm of the sum of all exponentials of the soft-capped logits, for hidden [..., H]: [...] float32."""
    reading = read(embedding, hidden.reshape(1, -1, hidden.shape[-1]), cap, 1.0, None)
    assert reading.log_total is not None  # `read` always computes it
    return reading.log_total.reshape(hidden.shape[:-1])


def sample_from(processed_logits: mx.array, key: mx.array) -> mx.array:
    """The plain definition of the draw: processed_logits [B, L, V] -> one token per position [B, L].

    Two-level inverse CDF: a group of GROUP tokens by its mass, then a token of the group. The distribution is exact.
    """
    shape = processed_logits.shape[:-1]
    probabilities = mx.softmax(processed_logits, axis=-1).reshape(-1, processed_logits.shape[-1])
    grouped = _grouped(probabilities)
    uniforms = draw_uniforms(key, shape).reshape(2, -1)
    group = _pick(grouped.sum(-1), uniforms[0])
    inside = mx.take_along_axis(grouped, group[:, None, None], axis=1)[:, 0]
    return (group * GROUP + _pick(inside, uniforms[1])).reshape(shape)


def draw_uniforms(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Two uniforms in [0, 1) for each of [B, L] positions: [2, B, L]. A key per row draws each row by itself."""
    if key.ndim == 1:
        return mx.random.uniform(shape=(2, *shape), key=key)
    return mx.stack([mx.random.uniform(shape=(2, shape[1]), key=row) for row in key], axis=1)


def _uniforms(key: mx.array, shape: tuple[int, ...], places: Places | None) -> mx.array:
    """`draw_uniforms` for [B, L] positions: of a whole canvas, or of those that `places` says."""
    if places is None:
        return draw_uniforms(key, shape)
    index, length = places
    return mx.take_along_axis(draw_uniforms(key, (shape[0], length)), index[None], axis=2)


def raw_logits(block: Embedding, rows: mx.array) -> mx.array:
    """Raw logits [rows, block] for rows [rows, hidden], in the model's dtype."""
    if isinstance(block, nn.Embedding) and mx.default_device() == mx.cpu:
        # The BLAS of MLX's Linux wheels multiplies by a transposed matrix one dot product at a time; with the matrix
        # copied the right way round, the same sums take two thirds of the time.
        return rows @ mx.contiguous(block.weight.T)
    return block.as_linear(rows)


class _Sums(NamedTuple):
    """Sums over blocks relative to `top`, the maximum, which `tokens` have: [rows, 1] each, `soft` [rows, hidden]."""

    top: mx.array
    tokens: mx.array
    mass: mx.array
    moment: mx.array
    soft: mx.array | None

    @property
    def entropy(self) -> mx.array:
        """[rows], nats: log of the mass minus the mean of x - top."""
        return (mx.log(self.mass) - self.moment / self.mass)[:, 0]

    @property
    def log_total(self) -> mx.array:
        """[rows]: the logarithm of the sum of all exponentials."""
        return (self.top + mx.log(self.mass))[:, 0]


class _Total:
    """Running sums over blocks, all relative to the running maximum. draw: keep the groups' masses too, to draw from.
    condition: sum up the embeddings.
    """

    def __init__(self, *, draw: bool, condition: bool) -> None:
        self.draw, self.condition = draw, condition
        self.sums: _Sums | None = None
        self.groups: list[mx.array] = []
        self.group_tops: list[mx.array] = []

    @property
    def state(self) -> list[mx.array]:
        return [array for array in (*(self.sums or ()), *self.groups[-1:]) if array is not None]

    def add(self, block: Embedding, scaled: mx.array, start: int) -> None:
        """Take in a block of processed logits [rows, block], whose first token is `start`."""
        top = scaled.max(axis=-1, keepdims=True)
        tokens = scaled.argmax(axis=-1, keepdims=True) + start
        old = self.sums
        if old is None:
            mass, moment, soft = self._block_sums(block, scaled, top)
            soft = None if soft is None else soft.astype(mx.float32)
        else:
            top, tokens, fall = _higher(old.top, old.tokens, top, tokens)
            mass, moment, soft = self._block_sums(block, scaled, top)
            mass, moment = _joined_sums(mass, moment, old.mass, old.moment, fall)
            soft = None if soft is None or old.soft is None else _joined_soft(soft, old.soft, fall)
        self.sums = _Sums(top, tokens, mass, moment, soft)

    def _block_sums(
        self, block: Embedding, scaled: mx.array, top: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """One block's mass, moment and, to condition a next step, weighted embeddings."""
        weights, moments = _exponentials(scaled, top)
        masses = weights
        if self.draw:
            masses = _grouped(weights).sum(-1)
            self.groups.append(masses)
            self.group_tops.append(top)
        soft = expected_embedding(block, weights) if self.condition else None
        return masses.sum(-1, keepdims=True), moments.sum(-1, keepdims=True), soft

    def group_masses(self, final_top: mx.array) -> mx.array:
        """Every group's mass [rows, groups], relative to the final maximum."""
        scaled = [_rescaled(groups, top, final_top) for groups, top in zip(self.groups, self.group_tops, strict=True)]
        return mx.concatenate(scaled, axis=-1)


def _grouped(weights: mx.array) -> mx.array:
    """[rows, n] -> [rows, ceil(n / GROUP), GROUP], zeros at the end."""
    padding = -weights.shape[-1] % GROUP
    if padding:
        weights = mx.pad(weights, [(0, 0), (0, padding)])
    return weights.reshape(weights.shape[0], -1, GROUP)


def _pick(masses: mx.array, uniform: mx.array) -> mx.array:
    """Inverse CDF: masses [rows, n] (not all zero), uniform [rows] -> an index with positive mass per row, int32."""
    below = mx.cumsum(masses, axis=-1)
    total = below[:, -1:]
    index = (below <= uniform[:, None] * total).sum(-1)
    # uniform * total can round up to total; the last index with a mass is where the sum first reaches it.
    return mx.minimum(index, (below < total).sum(-1)).astype(mx.int32)


def _member_weights(
    embedding: Embedding, rows: mx.array, group: mx.array, cap: mx.array, temperature: mx.array
) -> mx.array:
    """Unnormalised probabilities of the tokens of each row's group, [rows, GROUP]; their logits are computed again."""
    vocabulary = embedding.weight.shape[0]
    ids = group[:, None] * GROUP + mx.arange(GROUP)
    existing = mx.minimum(ids, vocabulary - 1)
    products: list[mx.array] = []
    # The members' embeddings are GROUP times the hidden states: only those of some rows exist at once.
    for start in range(0, rows.shape[0], MEMBER_ROWS):
        chosen = mx.depends(existing[start : start + MEMBER_ROWS], products[-1:])
        vectors = embedding_rows(embedding, chosen.flatten())(mx.arange(chosen.size)).reshape(*chosen.shape, -1)
        products.append((vectors @ rows[start : start + MEMBER_ROWS, :, None])[..., 0])
    raw = products[0] if len(products) == 1 else mx.concatenate(products)
    scaled = mx.where(ids < vocabulary, _process(raw, cap, temperature), -mx.inf)
    return mx.exp(scaled - scaled.max(axis=-1, keepdims=True))
