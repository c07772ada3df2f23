"""Models with random weights, here and in mlx-vlm: any number of layers at any size, in the community's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_diffusiongemma.config import FULL, SLIDING, ModelConfig
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffusiongemma.options import GenerationOptions

if TYPE_CHECKING:
    from mlx_vlm.models.diffusion_gemma import Model

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_experts": 8,
    "top_k_experts": 2,
    "sliding_window": 32,
    "max_position_embeddings": 131_072,
}
OPTIONS = GenerationOptions(
    max_steps=3, entropy_bound=0.1, t_max=0.8, t_min=0.4, stability=1, confidence=0.0, end_tokens=(), canvas_length=32
)


def config_json(kinds: list[str], canvas: int, **text: int) -> dict[str, Any]:
    """config.json of a text model with layers of the given kinds; what `text` leaves out is tiny."""
    layers = {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return {"model_type": "diffusion_gemma", "canvas_length": canvas, "text_config": TINY | text | layers}


def true_pattern(layers: int) -> list[str]:
    """Five sliding layers, then a full one, and so on."""
    return [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]


def random_model(config: dict[str, Any], bits: int | None, dtype: mx.Dtype = mx.float32) -> DiffusionGemma:
    """A model whose activations stay in range. bits: of the experts and self-conditioning, all else gets 8."""
    model = DiffusionGemma(ModelConfig.from_dict(config), OPTIONS)
    mx.random.seed(0)
    for name, array in tree_flatten(model.parameters()):
        values = mx.random.normal(array.shape).astype(dtype)
        if array.ndim > 1:
            values = values / array.shape[-1] ** 0.5
        else:
            values = (0.2 if "q_norm" in name else 1.0) + values * 0.05
        model.load_weights([(name, values)], strict=False)
        mx.eval(values)
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, class_predicate=community_layout(bits))
    mx.eval(model.parameters())
    return model


def community_layout(bits: int):
    """Which modules mlx-community's checkpoints quantize, and how."""

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        low = ".experts." in path or ".self_conditioning." in path
        return {"group_size": 64 if module.weight.shape[-1] % 64 == 0 else 32, "bits": bits if low else 8}

    return settings


def in_mlx_vlm(model: DiffusionGemma, config: dict[str, Any], bits: int | None) -> Model:
    """mlx-vlm's model on the same arrays."""
    from mlx_vlm.models.diffusion_gemma import Model, ModelConfig

    peer = Model(ModelConfig.from_dict(config))
    if bits is not None:
        nn.quantize(peer, class_predicate=community_layout(bits))
    peer.load_weights(tree_flatten(model.parameters()))
    peer.eval()
    return peer
