"""Floating-point operations of a denoising step, computed from a model's configuration."""

from __future__ import annotations

from ..checkpoints.accounting import visible_tokens
from ..config import LayerConfig, ModelConfig, TextConfig

SLIDING_ATTENTION, FULL_ATTENTION = "attention, sliding", "attention, full"
CONDITIONING, DENSE, EXPERTS, VOCABULARY = "embedding, self-conditioning", "dense MLP", "router, experts", "vocabulary"


def step_operations(config: ModelConfig, context: int) -> dict[str, dict[str, int]]:
    """Floating-point operations of one step by component, and there by the kind of product (a ceiling's name)."""
    text, rows = config.text, config.canvas_length
    gated = 2 * rows * 3 * text.hidden_size
    head = 2 * rows * text.hidden_size * text.vocab_size
    layers = len(text.layers)
    routing = 2 * rows * text.hidden_size * text.num_experts * layers
    attention: dict[str, dict[str, int]] = {}
    for layer in text.layers:
        sums = attention.setdefault(SLIDING_ATTENTION if layer.is_sliding else FULL_ATTENTION, {})
        for kind, count in _attention_operations(layer, text, rows, context).items():
            sums[kind] = sums.get(kind, 0) + count
    return {
        CONDITIONING: {"product": gated * text.intermediate_size},
        **attention,
        DENSE: {"product": gated * text.intermediate_size * layers},
        EXPERTS: {
            "product": routing,
            "experts": gated * text.moe_intermediate_size * text.top_k_experts * layers,
        },
        VOCABULARY: {"product": head, "product, plain": head},
    }


def _attention_operations(layer: LayerConfig, text: TextConfig, rows: int, context: int) -> dict[str, int]:
    queries = text.num_attention_heads * layer.head_dim
    keys = layer.num_key_value_heads * layer.head_dim * (2 if layer.is_sliding else 1)
    seen = visible_tokens(layer, text, context)
    scores = "attention, sliding" if layer.is_sliding else "attention, full"
    return {
        "product": 2 * rows * text.hidden_size * (2 * queries + keys),
        scores: 4 * rows * queries * (seen + rows),
    }
