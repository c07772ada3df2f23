"""Denoisers that stand in for the model: for more canvases than fit memory at once, and for positions that can take
certain tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ..model import vocabulary
from ..model.vocabulary import Reading

if TYPE_CHECKING:
    from ..generation.denoising import Denoiser, Job
    from ..model.cache import Cache, CacheRows
    from ..model.diffusion_gemma import DiffusionGemma
    from .places import Watch

Allowed = tuple[int, ...] | None  # ids that a position may take; None: any


class InParts:
    """Computes what `model` does, at most `most` rows at once: one part of the batch after the other.

    To the run it is one batch: draws and stopping are those of all rows, however few are computed at once. All rows
    follow the same prefix.
    """

    def __init__(self, model: DiffusionGemma, most: int):
        self.model, self.most = model, most

    def denoise(
        self, canvas: mx.array, cache: Cache | CacheRows, self_conditioning: mx.array | None = None
    ) -> mx.array:
        hidden: list[mx.array] = []
        for part in self._parts(canvas.shape[0]):
            own = mx.depends([canvas[part]], hidden[-1:])[0]  # or they would all be in memory together
            condition = None if self_conditioning is None else self_conditioning[part]
            hidden.append(self.model.denoise(own, cache, condition))
        return self._joined(hidden, canvas.shape[0])

    def embed(self, tokens: mx.array) -> mx.array:
        return self.model.embed(tokens)

    def read_vocabulary(self, hidden: mx.array, temperature: float | mx.array, key: mx.array | None = None) -> Reading:
        """Read the vocabulary as the model does. key: one per row, [B, 2], or none."""
        readings: list[Reading] = []
        for part in self._parts(hidden.shape[0]):
            before = [array for reading in readings[-1:] for array in reading if array is not None]
            own = mx.depends([hidden[part]], before)[0]
            heat = temperature[part] if isinstance(temperature, mx.array) else temperature
            readings.append(self.model.read_vocabulary(own, heat, None if key is None else key[part]))
        columns = zip(*readings, strict=True)
        return Reading._make(None if arrays[0] is None else self._joined(arrays, hidden.shape[0]) for arrays in columns)

    def _parts(self, rows: int) -> list[slice]:
        """Cut the rows into the fewest parts, all of one size, for which buffers stay: the last may repeat rows."""
        count = -(-rows // self.most)
        size = -(-rows // count)
        starts = [min(number * size, rows - size) for number in range(count)]
        return [slice(start, start + size) for start in starts]

    def _joined(self, arrays: Sequence[mx.array], rows: int) -> mx.array:
        if len(arrays) == 1:
            return arrays[0]
        repeated = sum(array.shape[0] for array in arrays) - rows
        return mx.concatenate([*arrays[:-1], arrays[-1][repeated:]])


class Restricted:
    """Reads the vocabulary where some positions may hold certain tokens only, and for one who watches.

    denoiser: computes all else as `model` does. allowed: for each canvas, what every position may hold; canvases may
    come while others are at work. Argmax, sample, entropy and soft embedding of a restricted position are those of the
    model's distribution over its allowed tokens. Meant for short lists of ids: their logits are computed at every
    position. watch: notes its own of each step.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        denoiser: Denoiser,
        allowed: Mapping[Job, Sequence[Allowed]],
        watch: Watch | None = None,
    ):
        self.model, self.denoiser, self.allowed, self.watch = model, denoiser, allowed, watch

    def read(
        self, hidden: mx.array, temperature: float | mx.array, key: mx.array | None, jobs: Sequence[Job]
    ) -> tuple[Reading, mx.array | None]:
        """Read the vocabulary as `denoiser` does, then once more at the restricted positions."""
        reading = self.denoiser.read_vocabulary(hidden, temperature, key)
        notes = None if self.watch is None else self.watch.note(reading, hidden, temperature, jobs)
        heat = mx.array(temperature).reshape(-1, 1, 1)
        rows = [self.allowed[job] for job in jobs]
        for ids in dict.fromkeys(ids for row in rows for ids in row if ids is not None):
            where = mx.array([[own == ids for own in row] for row in rows])
            reading = self._restrict(reading, hidden, heat, key, mx.array(ids), where)
        return reading, notes

    def _restrict(
        self,
        reading: Reading,
        hidden: mx.array,
        temperature: mx.array,
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
        if key is None or reading.sample is None or reading.soft_embedding is None:
            return reading._replace(tokens=tokens, entropy=entropy)
        sample = mx.where(where, ids[vocabulary.sample_from(logits, key)], reading.sample)
        dtype = reading.soft_embedding.dtype
        soft = probabilities.astype(dtype) @ self.model.embed(ids).astype(dtype)
        soft = mx.where(where[..., None], soft, reading.soft_embedding)
        return reading._replace(tokens=tokens, sample=sample, entropy=entropy, soft_embedding=soft)
