"""The model's two passes as functions without a cache, through which gradients flow.

The layers are those that generate: only what they attend to is put together here, since a cache writes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..config import FULL, SLIDING
from ..model.cache import Block, Cache
from ..model.diffusion_gemma import DecoderLayer, DiffusionGemma
from ..model.layer_cache import KeysValues
from ..model.layers import Mask
from ..model.vision import image_blocks
from .draws import Batch

Encode = Callable[[mx.array, Mask, mx.array], tuple[mx.array, mx.array, mx.array]]
Denoise = Callable[[mx.array, mx.array, mx.array, int | mx.array, mx.array | None, mx.array], mx.array]


def encode(model: DiffusionGemma, batch: Batch, checkpoint: bool) -> tuple[mx.array, list[KeysValues]]:
    """Read all tokens: normalised hidden states [B, N, H], and each layer's keys and values [B, heads, N, head_dim].

    checkpoint: keep only each layer's inputs and outputs for the gradient, and compute the rest again.
    """
    window = model.config.text.sliding_window
    x, blocks = _embedded(model, batch)
    masks = {SLIDING: _encoder_mask(model, batch, blocks, window), FULL: _encoder_mask(model, batch, blocks, None)}
    kept: list[KeysValues] = []
    for config, (layer, scalar) in zip(model.config.text.layers, model.encoding_layers, strict=True):
        x, keys, values = _encoding(layer, checkpoint)(x, masks[config.kind], scalar)
        kept.append((keys, values))
    hidden: mx.array = model.model.decoder.norm(x)
    return hidden, kept


def denoise(
    model: DiffusionGemma, batch: Batch, kept: Sequence[KeysValues], soft_embedding: mx.array | None, checkpoint: bool
) -> mx.array:
    """Denoise the corrupted canvases: hidden states [B, C, H]. Each sees what comes before it, as in inference."""
    decoder, window = model.model.decoder, model.config.text.sliding_window
    starts = [one.start for one in batch.drawn]
    positions = starts[0] if len(set(starts)) == 1 else mx.array(starts)
    masks = {SLIDING: _canvas_mask(batch, window), FULL: _canvas_mask(batch, None)}
    x = decoder.self_conditioning(model.embed(batch.canvas), soft_embedding)
    for config, layer, (keys, values) in zip(model.config.text.layers, decoder.layers, kept, strict=True):
        x = _denoising(layer, checkpoint)(x, keys, values, positions, masks[config.kind], layer.layer_scalar)
    hidden: mx.array = decoder.norm(x)
    return hidden


def _encoding(layer: DecoderLayer, checkpoint: bool) -> Encode:
    """A layer that returns its keys and values beside its output: an array that a checkpointed function only leaves
    behind has no gradient.
    """

    def run(x: mx.array, mask: Mask, scalar: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        taken: list[KeysValues] = []

        def extend(keys: mx.array, values: mx.array) -> KeysValues:
            taken.append((keys, values))
            return keys, values

        x = layer(x, extend, 0, mask, scalar)
        return x, *taken[0]

    return cast(Encode, nn.utils.checkpoint(layer, run)) if checkpoint else run


def _denoising(layer: DecoderLayer, checkpoint: bool) -> Denoise:
    """A layer that takes the prefix's keys and values as arguments, for the same reason."""

    def run(
        x: mx.array,
        prefix_keys: mx.array,
        prefix_values: mx.array,
        positions: int | mx.array,
        mask: mx.array | None,
        scalar: mx.array,
    ) -> mx.array:
        def extend(keys: mx.array, values: mx.array) -> KeysValues:
            return mx.concatenate([prefix_keys, keys], axis=2), mx.concatenate([prefix_values, values], axis=2)

        return layer(x, extend, positions, mask, scalar)

    return cast(Denoise, nn.utils.checkpoint(layer, run)) if checkpoint else run


def _embedded(model: DiffusionGemma, batch: Batch) -> tuple[mx.array, list[list[Block]]]:
    """The tokens' embeddings [B, N, H], images in their places, and where in each row those are."""
    x = model.embed(batch.tokens)
    blocks: list[list[Block]] = []
    for row, one in enumerate(batch.drawn):
        blocks.append(image_blocks(list(one.tokens), model.config.image_token_id) if one.images else [])
        for (first, last), image in zip(blocks[row], one.images, strict=True):
            x[row, first:last] = model.encode_image(image).astype(x.dtype)
    return x, blocks


def _encoder_mask(model: DiffusionGemma, batch: Batch, blocks: list[list[Block]], window: int | None) -> Mask:
    """What each token sees of a layer with this window; the fill at the rows' ends comes after all that counts."""
    both_ways = model.config.text.use_bidirectional_attention == "vision"
    empty = Cache(model.config.text, keep=0)
    masks = [empty.encoder_mask(batch.tokens.shape[1], window, own if both_ways else []) for own in blocks]
    if not any(own for own in blocks if both_ways):
        return masks[0]
    causal = mx.tri(batch.tokens.shape[1], dtype=mx.bool_)
    return mx.stack([mask if isinstance(mask, mx.array) else causal for mask in masks])[:, None]


def _canvas_mask(batch: Batch, window: int | None) -> mx.array | None:
    """The prefix that each row's canvas sees, and all of the canvas: [B, 1, 1, N + C]."""
    count, canvas = batch.tokens.shape[1], batch.canvas.shape[1]
    starts = mx.array([one.start for one in batch.drawn])[:, None]
    keys = mx.arange(count + canvas)[None]
    seen = keys < starts
    if window is not None:
        seen = seen & (keys > starts - window)
    return (seen | (keys >= count))[:, None, None]
