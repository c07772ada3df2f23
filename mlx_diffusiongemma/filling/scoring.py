"""Scores: how probable given tokens are at given places of a canvas, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..checkpoints.accounting import rows_after
from ..generation import sampling

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor, Prompt

ROWS = 8  # canvases in one forward pass
POSITIONS = 32  # of which the logits over the whole vocabulary exist at once
THOUGHT, EMPTY_THOUGHT = "<|channel>", "<|channel>thought\n<channel|>"


class Probe(NamedTuple):
    """Asks for the probability of `token` at `position`, given everything on `canvas`, also what is there itself."""

    canvas: tuple[int, ...]
    position: int
    token: int


class Cancelled(Exception):
    """Nobody wants any more what is being computed. Never leaves the request that was cancelled."""


def log_probabilities(
    model: DiffusionGemma, cache: Cache, probes: Sequence[Probe], cancelled: Callable[[], bool] = lambda: False
) -> list[float]:
    """The log probability of each probe's token after the cached prefix (one row), at temperature 1, in nats.

    The canvases have one length. Each different one is computed once, ROWS together or as many as memory allows.
    Raises Cancelled where `cancelled` says so before one of these batches.
    """
    by_canvas: dict[tuple[int, ...], list[Probe]] = {}
    for probe in dict.fromkeys(probes):
        by_canvas.setdefault(probe.canvas, []).append(probe)
    canvases = list(by_canvas)
    found: dict[Probe, float] = {}
    rows = rows_after(cache, ROWS)
    try:
        for start in range(0, len(canvases), rows):
            if cancelled():
                raise Cancelled
            together = canvases[start : start + rows]
            hidden = model.denoise(mx.array(together), cache)
            cache.settle()  # before anything is computed: the canvases are then written in place
            asked = [(row, probe) for row, canvas in enumerate(together) for probe in by_canvas[canvas]]
            found |= _read(model, hidden, asked)
    finally:
        cache.release()
    return [found[probe] for probe in probes]


def _read(model: DiffusionGemma, hidden: mx.array, asked: list[tuple[int, Probe]]) -> dict[Probe, float]:
    """The log probability of each probe's token in its row of hidden [B, L, H]."""
    found: dict[Probe, float] = {}
    for first in range(0, len(asked), POSITIONS):
        few = asked[first : first + POSITIONS]
        at = hidden[mx.array([row for row, _ in few]), mx.array([probe.position for _, probe in few])]
        values = log_softmax_at(model.logits(at[None])[0], mx.array([probe.token for _, probe in few]))
        found |= zip((probe for _, probe in few), np.array(values).tolist(), strict=True)
    return found


def log_softmax_at(logits: mx.array, tokens: mx.array) -> mx.array:
    """logits [P, V], tokens [P] -> [P]."""
    return mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)


def noise_canvases(seed: int, count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Canvases of uniform random ids: the starting canvases that a batch with this seed would have."""
    draws = [sampling.Draws(seed, row) for row in range(count)]
    keys = sampling.draw_keys(draws, [0] * count, sampling.NOISE)
    canvases: list[list[int]] = np.array(sampling.noise(keys, length, vocabulary)).tolist()
    return canvases


def reply_opening(
    model: DiffusionGemma,
    processor: Processor,
    prompt: Prompt,
    cache: Cache,
    length: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[int]:
    """The tokens of an empty thought where a reply to `prompt` (encoded in `cache`) begins with one, else none.

    Nothing in a checkpoint's files tells: some templates end the prompt with the block, some models write it by
    themselves, and others reply at once. So the model is asked: what it puts first on a canvas of noise, of so many
    tokens and the same for all, decides. The cache remembers the answer for this prompt.
    Raises Cancelled, as `log_probabilities`.
    """
    marker = processor.tokenizer.get_vocab().get(THOUGHT)
    block = processor.tokenizer.encode(EMPTY_THOUGHT, add_special_tokens=False)
    if marker is None or prompt.tokens[-len(block) :] == block:
        return []
    asked = length, *cache.labels
    if asked != cache.reply_opening[0]:
        [canvas] = noise_canvases(0, 1, length, model.config.text.vocab_size)
        [value] = log_probabilities(model, cache, [Probe(tuple(canvas), 0, marker)], cancelled)
        cache.reply_opening = asked, value > math.log(0.5)
    return block if cache.reply_opening[1] else []


def log_mean(log_probabilities: Sequence[float]) -> float:
    """The logarithm of the arithmetic mean of probabilities given by their logarithms, however small they are."""
    top = max(log_probabilities)
    return top + math.log(sum(math.exp(value - top) for value in log_probabilities) / len(log_probabilities))
