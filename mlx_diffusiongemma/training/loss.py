"""The published objective: denoise one canvas, and predict each next token (arXiv 2608.00146, equation 13)."""

from __future__ import annotations

import mlx.core as mx

from ..model.diffusion_gemma import DiffusionGemma
from .cross_entropy import cross_entropy
from .draws import Batch
from .forward import denoise, encode


def diffusion_loss(model: DiffusionGemma, batch: Batch, *, checkpoint: bool = False) -> tuple[mx.array, mx.array]:
    """The denoising loss and the next-token loss of a batch, in nats per token: two float32 scalars.

    Training minimises their sum. The denoising loss is the mean cross-entropy over all positions of the drawn canvas,
    corrupted or not; the next-token loss that of the causal pass over the prompt and the reply. Gradients of the
    former flow into the causal pass through the keys and values. checkpoint: compute the layers' inner states again for
    the gradient instead of keeping them.
    """
    embedding, cap = model.model.decoder.embed_tokens, model.config.text.final_logit_softcapping
    hidden, kept = encode(model, batch, checkpoint)
    causal = cross_entropy(embedding, hidden[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), cap)
    denoised = denoise(model, batch, kept, _conditioning(model, batch, kept), checkpoint)
    canvas = cross_entropy(embedding, denoised.flatten(0, 1), batch.targets.flatten(), cap)
    return (canvas * batch.weights.flatten()).sum(), (causal * batch.next_weights.flatten()).sum()


def _conditioning(model: DiffusionGemma, batch: Batch, kept: list[tuple[mx.array, mx.array]]) -> mx.array | None:
    """What a first pass without gradient believes, [B, C, H]; where the coin fell so zeros, which are no signal at all.

    (Zero logits would be a signal: the mean of all embeddings.)
    """
    coins = [one.conditioned for one in batch.drawn]
    if not any(coins):
        return None
    still = [(mx.stop_gradient(keys), mx.stop_gradient(values)) for keys, values in kept]
    hidden = mx.stop_gradient(denoise(model, batch, still, None, checkpoint=False))
    soft = model.read_vocabulary(hidden, 1.0, condition=True).soft_embedding
    assert soft is not None
    return mx.stop_gradient(soft) * mx.array(coins)[:, None, None].astype(soft.dtype)
