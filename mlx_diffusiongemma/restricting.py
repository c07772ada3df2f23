"""A denoiser some of whose positions can take certain tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from .model import vocabulary
from .model.vocabulary import Reading

if TYPE_CHECKING:
    from .model.cache import Cache
    from .model.diffusion_gemma import DiffusionGemma

Allowed = tuple[int, ...] | None  # ids that a position may take; None: any


class Restricted:
    """`model` for a `CanvasRun` in which `allowed` [rows][positions] says what each position may hold.

    Argmax, sample, entropy and soft embedding of a restricted position are those of the model's distribution over its
    allowed tokens. Meant for short lists of ids: their logits are computed at every position.
    """

    def __init__(self, model: DiffusionGemma, allowed: Sequence[Sequence[Allowed]]):
        self.model = model
        kinds = dict.fromkeys(ids for row in allowed for ids in row if ids is not None)
        self.kinds = [(mx.array(ids), mx.array([[own == ids for own in row] for row in allowed])) for ids in kinds]

    def denoise(self, canvas: mx.array, cache: Cache, self_conditioning: mx.array | None = None) -> mx.array:
        return self.model.denoise(canvas, cache, self_conditioning)

    def embed(self, tokens: mx.array) -> mx.array:
        return self.model.embed(tokens)

    def read_vocabulary(self, hidden: mx.array, temperature: float, key: mx.array | None = None) -> Reading:
        """As the model's, with the restricted positions replaced."""
        reading = self.model.read_vocabulary(hidden, temperature, key)
        for ids, where in self.kinds:
            reading = self._restrict(reading, hidden, temperature, key, ids, where)
        return reading

    def _restrict(
        self,
        reading: Reading,
        hidden: mx.array,
        temperature: float,
        key: mx.array | None,
        ids: mx.array,
        where: mx.array,
    ) -> Reading:
        embedding = self.model.model.decoder.embed_tokens
        cap = self.model.config.text.final_logit_softcapping
        logits = vocabulary.logits(vocabulary.embedding_rows(embedding, ids), hidden, cap) / temperature  # [B, L, ids]
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        probabilities = mx.exp(log_probabilities)
        tokens = mx.where(where, ids[logits.argmax(axis=-1)], reading.tokens)
        entropy = mx.where(where, -(probabilities * log_probabilities).sum(axis=-1), reading.entropy)
        if key is None:
            return Reading(tokens, None, entropy, None)
        sample = mx.where(where, ids[vocabulary.sample_from(logits, key)], reading.sample)
        soft = probabilities.astype(reading.soft_embedding.dtype) @ self.model.embed(ids).astype(
            reading.soft_embedding.dtype
        )
        return Reading(tokens, sample, entropy, mx.where(where[..., None], soft, reading.soft_embedding))
