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
    from mlx_lm.models import gemma4_text
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


def in_mlx_lm(model: DiffusionGemma, config: dict[str, Any], bits: int | None) -> gemma4_text.Model:
    """The same arrays in mlx-lm's `gemma4_text`, which decodes left to right: the encoder's `layer_scalar`s, no
    self-conditioning. bits: as for `random_model`.
    """
    from mlx_lm.models import gemma4_text

    text = dict(config["text_config"])
    rope = {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
    own = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": True}
    given = own | {"attention_k_eq_v": True, "use_double_wide_mlp": False, "rope_parameters": rope}
    peer = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(text | given))
    if bits is not None:
        nn.quantize(peer, class_predicate=community_layout(bits))
    weights: dict[str, mx.array] = {}
    for name, array in tree_flatten(model.parameters()):
        if name.startswith("model.encoder.language_model.layers"):
            weights["model." + name.removeprefix("model.encoder.language_model.")] = array
        elif name.startswith("model.decoder.") and "self_conditioning" not in name and "layer_scalar" not in name:
            weights["model." + name.removeprefix("model.decoder.")] = array
    for name in [name for name in weights if ".experts." in name]:
        home, _, kind = name.partition(".experts.")
        array = weights.pop(name)
        part, _, what = kind.partition(".")
        if part == "gate_up_proj":
            gate, up = map(mx.contiguous, mx.split(array, 2, axis=1))
            weights[f"{home}.experts.switch_glu.gate_proj.{what}"] = gate
            weights[f"{home}.experts.switch_glu.up_proj.{what}"] = up
        else:
            weights[f"{home}.experts.switch_glu.{part}.{what}"] = array
    peer.load_weights(list(weights.items()))
    peer.eval()
    mx.eval(peer.parameters())
    return peer
