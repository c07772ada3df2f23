"""The mixture of experts: router and experts on mlx-lm's switch layers."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from ..config import TextConfig
from .layers import geglu

SORTED = 64  # rows from which on sorting them by expert pays: mlx-lm's own number


class Router(nn.Module):
    """Chooses each token's experts and weighs them (`DiffusionGemmaTextRouter`)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps
        self.root_size = config.hidden_size**-0.5
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [tokens, hidden] -> experts [tokens, top_k] and their weights, float32."""
        scores = self.proj(mx.fast.rms_norm(x, self.scale, self.eps))
        # The choice has no gradient; without saying so, MLX finds none for the indices and gives up.
        experts = mx.stop_gradient(mx.argpartition(scores, kth=-self.top_k, axis=-1)[..., -self.top_k :])
        # Softmax over all experts, renormalised over the chosen, is softmax over the chosen.
        chosen = mx.take_along_axis(scores, experts, axis=-1).astype(mx.float32) * self.root_size
        return experts, mx.softmax(chosen, axis=-1) * self.per_expert_scale[experts]


class Experts(nn.Module):
    """Gated MLPs, one per expert (`DiffusionGemmaTextExperts`)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = SwitchLinear(hidden, 2 * inner, config.num_experts, bias=False)
        self.down_proj = SwitchLinear(inner, hidden, config.num_experts, bias=False)

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [tokens, hidden], experts and weights [tokens, top_k] -> [tokens, hidden]."""
        if experts.size < SORTED:
            gate, up = mx.split(self.gate_up_proj(x[:, None, None], experts), 2, axis=-1)
            output = self.down_proj(geglu(gate, up), experts)[:, :, 0]
            return (weights.astype(output.dtype)[:, None] @ output)[:, 0].astype(x.dtype)
        # Rows sorted by expert let the gathered products run as one matrix product per expert.
        top_k = experts.shape[-1]
        flat = experts.flatten()
        order = mx.argsort(flat)
        rows, chosen = x[order // top_k][:, None], flat[order]
        gate, up = mx.split(self.gate_up_proj(rows, chosen, sorted_indices=True), 2, axis=-1)
        output = self.down_proj(geglu(gate, up), chosen, sorted_indices=True)
        output = output[mx.argsort(order)].reshape(*experts.shape, -1)
        return (weights.astype(output.dtype)[:, None] @ output)[:, 0].astype(x.dtype)
