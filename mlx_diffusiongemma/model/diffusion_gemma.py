"""DiffusionGemma: one set of text weights, used as a causal encoder of the prefix and as a bidirectional denoiser of
the canvas. `encode` is the only writer of the cache; `denoise` only reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..config import FULL, SLIDING, LayerConfig, ModelConfig, TextConfig
from ..errors import CheckpointError
from ..options import REFERENCE_SETTINGS, GenerationOptions
from . import vocabulary
from .adapters import Adapter, use_adapter
from .budgets import PREFILL_CHUNK
from .cache import SNAPSHOT_BYTES, Block, Cache, CacheRows, Label
from .joining import fusible
from .layer_cache import LayerCache, LayerRows, Places
from .layers import MLP, Attention, Extend, Mask, SelfConditioning
from .moe import Experts, Router
from .vision import VisionModel, image_blocks

if TYPE_CHECKING:
    from ..processing.images import PreparedImage

T = TypeVar("T")


class DecoderLayer(nn.Module):
    """Attention, then a dense MLP and the experts side by side (`DiffusionGemmaDecoderTextLayer`)."""

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(hidden, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_feedforward_layernorm_1 = nn.RMSNorm(hidden, eps=eps)
        self.post_feedforward_layernorm_2 = nn.RMSNorm(hidden, eps=eps)
        self.pre_feedforward_layernorm_2 = nn.RMSNorm(hidden, eps=eps)
        self.layer_scalar = mx.ones((1,))

    def __call__(
        self,
        x: mx.array,
        extend: Extend,
        offset: int | mx.array,
        mask: Mask | list[Mask],
        scalar: mx.array,
    ) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), extend, offset, mask)
        x = x + self.post_attention_layernorm(attended)
        dense = self.mlp(self.pre_feedforward_layernorm(x))
        tokens = x.reshape(-1, x.shape[-1])
        routed = self.experts(self.pre_feedforward_layernorm_2(tokens), *self.router(tokens)).reshape(x.shape)
        both = self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed)
        return (x + self.post_feedforward_layernorm(both)) * scalar


class Decoder(nn.Module):
    """The text stack: its weights are saved here, under `model.decoder`, and serve the encoder too."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config.hidden_size, config.intermediate_size, config.rms_norm_eps)


class EncoderLayer(nn.Module):
    """All that a layer has of its own when it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        # A whole layer where an adapter is not for both towers alike: see `adapters`.
        self.layers: list[EncoderLayer | DecoderLayer] = [EncoderLayer() for _ in config.layers]


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.language_model = LanguageModel(config.text)


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config.text)


class DiffusionGemma(nn.Module):
    """The model. B batch, N prompt, L canvas, H hidden, V vocabulary."""

    def __init__(
        self,
        config: ModelConfig,
        options: GenerationOptions | None = None,
        load_vision: Callable[[], VisionModel] | None = None,
    ):
        """options: the checkpoint's own settings; None of them, or None in them, is the reference's, where nothing but
        max_tokens ends a reply. load_vision: reads the vision weights, evaluated; called once, at the first image.
        """
        super().__init__()
        reference = replace(REFERENCE_SETTINGS, canvas_length=config.canvas_length)
        self.config = config
        self.options = (options or GenerationOptions()).filled_from(reference)
        self.model = Backbone(config)
        self._vision = _once(load_vision) if load_vision else None
        self.own_weights: Adapter | None = None  # those that an adapter of whole weights replaced

    def make_cache(self, snapshot_bytes: int = SNAPSHOT_BYTES) -> Cache:
        """An empty prefix. snapshot_bytes: see `Cache`."""
        return Cache(self.config.text, self.config.canvas_length, snapshot_bytes)

    def fuse(self) -> None:
        """Join projections of one input (q, k, v; gate, up) into one product: same numbers, names unchanged.

        What gives one of them another weight, or puts another layer in its place, undoes its join.
        """
        for module in fusible(self):
            module.fuse()

    def unfuse(self) -> None:
        """Undo `fuse`. The weights stay where they are in memory."""
        for module in fusible(self):
            module.unfuse()

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Compute with this adapter instead of the one before, or with none; the base stays in memory.

        What caches hold was computed with the adapter before: make new ones. Raises AdapterError where the adapter does
        not fit, and leaves the model without one.
        """
        use_adapter(self, adapter)

    def encode(
        self,
        tokens: mx.array,
        cache: Cache,
        images: Sequence[PreparedImage] | None = None,
        lengths: list[int] | None = None,
    ) -> mx.array:
        """Append tokens [B, N] to the cache; returns their normalised hidden states [B, N, H].

        images: one for each run of image tokens, in order; only for B = 1. Without images, the image token is an
        ordinary one. lengths: real tokens of each row of a ragged batch, whose rows are filled up at their ends; only
        the first call on an empty cache can be ragged. Long prompts are encoded in chunks of PREFILL_CHUNK.
        """
        hidden = mx.concatenate([chunk for _, chunk in self._chunks(tokens, cache, images, lengths)], axis=1)
        return _shift_rows(hidden, [n - tokens.shape[1] for n in lengths]) if lengths else hidden

    def encode_chunks(
        self,
        tokens: mx.array,
        cache: Cache,
        images: Sequence[PreparedImage] | None = None,
        lengths: list[int] | None = None,
    ) -> Iterator[int]:
        """Append tokens as `encode` does, a chunk at a time: yields how many are done, each time with them computed."""
        for done, hidden in self._chunks(tokens, cache, images, lengths):
            del hidden  # it is not computed, and holds the last layer's buffer, which could not be written in place
            yield done

    def _chunks(
        self,
        tokens: mx.array,
        cache: Cache,
        images: Sequence[PreparedImage] | None,
        lengths: list[int] | None,
    ) -> Iterator[tuple[int, mx.array]]:
        """How many tokens are done and the chunk's hidden states, which are those of the rows moved to the end where
        the batch is ragged.
        """
        ids: list[int] = tokens[0].tolist()  # type: ignore[assignment]  # MLX's stub does not know the number of axes
        blocks = self._image_blocks(ids, len(tokens), images or ())
        if lengths is not None:
            tokens = self._align(tokens, cache, lengths)
        labels = self.labels(ids, images or ()) if tokens.shape[0] == 1 and cache.padding is None else []
        features = iter([self.encode_image(image) for image in images or ()])
        for start, stop in chunk_bounds(tokens.shape[1], blocks):
            inside = [(first - start, last - start) for first, last in blocks if start <= first < stop]
            x = self.embed(tokens[:, start:stop])
            for first, last in inside:
                x[:, first:last] = next(features).astype(x.dtype)
            with cache.writing():
                hidden = [self._encode(x, cache, inside)]  # what is yielded is the caller's alone
                cache.evaluate()
                cache.labels += labels[start:stop]
            yield stop, hidden.pop()

    def labels(self, tokens: list[int], images: Sequence[PreparedImage] = ()) -> list[Label]:
        """The labels that a cache keeps of a prompt's tokens: their ids, and for an image's tokens its digest."""
        labels: list[Label] = list(tokens)
        blocks = image_blocks(tokens, self.config.image_token_id) if images else []
        for (first, last), image in zip(blocks, images, strict=True):
            labels[first:last] = [image.digest] * (last - first)
        return labels

    def encode_image(self, image: PreparedImage) -> mx.array:
        """The soft tokens of one image, [soft_tokens, H]. Raises CheckpointError where there are no vision weights."""
        if self._vision is None:
            raise CheckpointError("This checkpoint has no vision weights, so it cannot see images; leave them out.")
        return self._vision()(mx.array(image.pixels), mx.array(image.positions))

    def _image_blocks(self, tokens: list[int], rows: int, images: Sequence[PreparedImage]) -> list[Block]:
        """Where the images' tokens are among those of the first of `rows`. Raises ValueError where they do not fit the
        images, or there are other rows.
        """
        if not images:
            return []
        if rows != 1:
            raise ValueError("images can be encoded in a batch of one row only")
        blocks = image_blocks(tokens, self.config.image_token_id)
        if len(blocks) != len(images):
            raise ValueError(f"the tokens have {len(blocks)} runs of the image token for {len(images)} images")
        return blocks

    def _align(self, tokens: mx.array, cache: Cache, lengths: list[int]) -> mx.array:
        """Move a ragged batch's rows to their ends and note the padding in the cache."""
        rows, count = tokens.shape
        if cache.offset:
            raise ValueError("only an empty cache takes a ragged batch")
        if len(lengths) != rows or not all(0 < n <= count for n in lengths):
            raise ValueError(f"lengths must be {rows} numbers from 1 to {count}, not {lengths}")
        if min(lengths) < count:
            cache.padding = tuple(count - n for n in lengths)
            tokens = _shift_rows(tokens, list(cache.padding))
        return tokens

    def encode_lazily(self, tokens: mx.array, cache: Cache | CacheRows) -> mx.array:
        """Append tokens [B, N] that may still be lazy, as `encode` does, without waiting for anything.

        Returns their normalised hidden states [B, N, H]. What the tokens are is not known here: the caller, who reads
        them later, adds them to `labels`, or trims them off.
        """
        return self._encode(self.embed(tokens), cache, [])

    def _encode(self, x: mx.array, cache: Cache | CacheRows, blocks: list[Block]) -> mx.array:
        """Append embeddings [B, N, H]. blocks: where among them images' tokens are."""
        text, count = self.config.text, x.shape[1]
        if text.use_bidirectional_attention != "vision":
            blocks = []
        masks = {
            SLIDING: cache.encoder_mask(count, text.sliding_window, blocks),
            FULL: cache.encoder_mask(count, None, blocks),
        }
        positions = cache.positions
        caches: Sequence[LayerCache | LayerRows] = cache.layers
        for config, (layer, scalar), kept in zip(text.layers, self.encoding_layers, caches, strict=True):
            x = layer(x, kept.append, positions, masks[config.kind], scalar)
        cache.extended(count)
        return self.model.decoder.norm(x)

    @property
    def encoding_layers(self) -> list[tuple[DecoderLayer, mx.array]]:
        """The layers that encode, and their scalars: the decoder's layers, or those that an adapter gave it."""
        both = zip(self.model.decoder.layers, self.model.encoder.language_model.layers, strict=True)
        return [(own if isinstance(own, DecoderLayer) else layer, own.layer_scalar) for layer, own in both]

    def denoise(
        self,
        canvas: mx.array,
        cache: Cache | CacheRows,
        self_conditioning: mx.array | None = None,
        places: Places | None = None,
    ) -> mx.array:
        """Hidden states [B, L, H] of the canvas's tokens [B, L] after the cached prefix, which is only read.

        self_conditioning: what `soft_embedding` made of the previous step, [B, L, H]; None at the first step.
        A cache of one row serves any B; `CacheRows` gives each row a prefix of its own. places: the positions that the
        tokens are at, where they are but part of a canvas, whose other keys and values are those of the step before
        (caches of one row only); duplicates do no harm.
        """
        decoder, window = self.model.decoder, self.config.text.sliding_window
        length = canvas.shape[1] if places is None else places[1]
        masks = {SLIDING: cache.canvas_mask(length, window), FULL: cache.canvas_mask(length, None)}
        x = decoder.self_conditioning(self.embed(canvas), self_conditioning)
        positions = cache.positions
        if places is not None:
            positions = places[0] + (positions if isinstance(positions, int) else positions[:, None])
        caches: Sequence[LayerCache | LayerRows] = cache.layers
        for config, layer, kept in zip(self.config.text.layers, decoder.layers, caches, strict=True):
            extend = kept.with_canvas if places is None else partial(kept.with_part_of_canvas, places=places)
            x = layer(x, extend, positions, masks[config.kind], layer.layer_scalar)
        return decoder.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """Every token's logit, soft-capped, for hidden [B, L, H]: [B, L, V] float32."""
        return vocabulary.logits(self.model.decoder.embed_tokens, hidden, self.config.text.final_logit_softcapping)

    def logits_of(self, hidden: mx.array, tokens: mx.array) -> mx.array:
        """The logits of one token each, tokens [B, L], for hidden [B, L, H]: [B, L] float32, soft-capped."""
        cap = self.config.text.final_logit_softcapping
        return vocabulary.logits_of(self.model.decoder.embed_tokens, hidden, tokens, cap)

    def soft_embedding(self, processed_logits: mx.array) -> mx.array:
        """The embedding that processed_logits [B, L, V], which are divided by the temperature, lead to expect:
        [B, L, H], scaled by sqrt(H).
        """
        return self._scaled(vocabulary.soft_embedding(self.model.decoder.embed_tokens, processed_logits))

    def read_vocabulary(
        self,
        hidden: mx.array,
        temperature: float | mx.array,
        key: mx.array | None = None,
        places: Places | None = None,
        *,
        condition: bool | None = None,
    ) -> vocabulary.Reading:
        """Read tokens, sample, entropy and soft embedding off hidden [B, L, H] in one pass; no logits are kept.

        temperature: one for all rows, or of each row, [B]. key: PRNG key [2], or one per row [B, 2]; without one
        nothing is drawn. places: see `denoise`; each is drawn as in the whole canvas. condition: whether to compute the
        soft embedding, which a next step is conditioned on; None is where something is drawn.
        """
        cap = self.config.text.final_logit_softcapping
        reading = vocabulary.read(self.model.decoder.embed_tokens, hidden, cap, temperature, key, places, condition)
        if reading.soft_embedding is None:
            return reading
        return reading._replace(soft_embedding=self._scaled(reading.soft_embedding))

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [...] -> their embeddings [..., H], scaled by sqrt(H)."""
        return self._scaled(self.model.decoder.embed_tokens(tokens))

    @property
    def dtype(self) -> mx.Dtype:
        """The type of activations, keys and values: that of the norms, which are never quantized."""
        return self.model.decoder.norm.weight.dtype

    def _scaled(self, embeddings: mx.array) -> mx.array:
        scale = vocabulary.embedding_scale(self.model.decoder.embed_tokens, self.config.text.hidden_size)
        return embeddings.astype(scale.dtype) * scale


def chunk_bounds(count: int, blocks: Sequence[Block] = ()) -> Iterator[tuple[int, int]]:
    """Where `count` tokens are cut into chunks of about PREFILL_CHUNK: never inside an image's block."""
    start = 0
    while start < count:
        stop = min(start + PREFILL_CHUNK, count)
        for first, last in blocks:
            if first < stop < last:
                stop = first if first > start else last
        yield start, stop
        start = stop


def _shift_rows(array: mx.array, shifts: list[int]) -> mx.array:
    """Each row of [B, N, ...] rolled by its own shift along N."""
    return mx.stack([mx.roll(row, shift, 0) for row, shift in zip(array, shifts, strict=True)])


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """`make`, called by the first thread that needs what it makes, while others wait for it."""
    lock = threading.Lock()
    made: list[T] = []

    def get() -> T:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get
