"""The random part of training: which canvas, how noisy, and whether the model may condition on itself.

The objective is that of DiffusionGemma's report (arXiv 2608.00146, §4 and §8, equation 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from ..processing.images import PreparedImage
    from .data import Example

FILL = 1  # the end token that fills a reply up to whole canvases
NOISE = 1e-4  # t is uniform between this and 1 minus this
BUCKET = 64  # token counts are filled up to a multiple of this, so that few shapes of arrays exist


@dataclass(frozen=True)
class Drawn:
    """One reply to learn, with its draws made. C is the canvas length, P the prompt's.

    tokens: the prompt and the reply, filled up with the end token to K canvases: P + K·C. start: where among them the
    drawn canvas is. noisy: that canvas, corrupted, C ids. weights: of its positions in the denoising loss. learned: the
    first so many tokens count in the next-token loss. conditioned: whether the canvas sees what a first pass believed.
    """

    tokens: tuple[int, ...]
    prompt: int
    start: int
    noisy: tuple[int, ...]
    weights: tuple[float, ...]
    learned: int
    conditioned: bool
    images: tuple[PreparedImage, ...] = ()


def draw(example: Example, canvas: int, vocabulary: int, random: np.random.Generator) -> Drawn:
    """Draw one of the reply's canvases, its noise and the coin of self-conditioning.

    A reply that was cut off teaches no ending: it is cut to whole canvases, or its fill does not count where it has not
    even one.
    """
    reply = list(example.reply)
    if not example.whole and len(reply) > canvas:
        reply = reply[: len(reply) // canvas * canvas]
    count = -(-len(reply) // canvas)
    fill = count * canvas - len(reply)
    tokens = [*example.prompt, *reply, *[FILL] * fill]
    real = len(tokens) if example.whole else len(tokens) - fill
    start = len(example.prompt) + int(random.integers(count)) * canvas
    clean = np.array(tokens[start : start + canvas])
    is_noise = random.random(canvas) < random.uniform(NOISE, 1 - NOISE)
    noisy = np.where(is_noise, random.integers(vocabulary, size=canvas), clean)
    return Drawn(
        tuple(tokens),
        len(example.prompt),
        start,
        tuple(noisy.tolist()),
        tuple(1.0 if position < real else 0.0 for position in range(start, start + canvas)),
        real,
        bool(random.random() < 0.5),
        example.images,
    )


@dataclass(frozen=True)
class Batch:
    """Several drawn replies as arrays: B rows, filled up at their ends to N tokens, with canvases of C.

    tokens [B, N], canvas [B, C] (corrupted) and targets [B, C] are token ids; weights [B, C] float32 are the positions'
    shares in the mean over the batch, and so are next_weights [B, N - 1] for predicting token j + 1 at position j.
    """

    drawn: tuple[Drawn, ...]
    tokens: mx.array
    canvas: mx.array
    targets: mx.array
    weights: mx.array
    next_weights: mx.array

    @classmethod
    def of(cls, drawn: Sequence[Drawn], *, mask_prompt: bool = False) -> Batch:
        """The arrays of `drawn`. mask_prompt: the next-token loss is of the reply's tokens alone."""
        longest = -(-max(len(one.tokens) for one in drawn) // BUCKET) * BUCKET
        canvas = len(drawn[0].noisy)
        tokens = [[*one.tokens, *[FILL] * (longest - len(one.tokens))] for one in drawn]
        weights = np.array([one.weights for one in drawn])
        learned = np.zeros((len(drawn), longest))
        for row, one in zip(learned, drawn, strict=True):
            row[one.prompt if mask_prompt else 1 : one.learned] = 1
        return cls(
            tuple(drawn),
            mx.array(tokens),
            mx.array([one.noisy for one in drawn]),
            mx.array([one.tokens[one.start : one.start + canvas] for one in drawn]),
            mx.array(_shares(weights)),
            mx.array(_shares(learned[:, 1:])),
        )


def _shares(weights: np.ndarray) -> np.ndarray:
    """Weights whose sum over a row is 1 / rows, as float32: the mean over rows of each row's mean."""
    totals = np.maximum(weights.sum(axis=1, keepdims=True), 1)
    shares: np.ndarray = (weights / totals / len(weights)).astype(np.float32)
    return shares
