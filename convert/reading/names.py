"""The names of all tensors of a DiffusionGemma checkpoint, and which belong together.

The published (Hugging Face) layout and mlx-community's differ in one thing: the stacked experts have no `.weight` there
and have one here. Everything else keeps its key.
"""

from __future__ import annotations

import re

from ...config import LayerConfig, ModelConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]

# Saved by some tools though the model ties or computes them.
DROPPED = (
    r"lm_head\.weight",
    r"model\.encoder\.language_model\.(?!layers\.\d+\.layer_scalar$).*",
    r".*rotary_emb.*",
    r".*\.[kv]_scale",  # of a quantized K/V cache, which other runtimes keep
)
BARE_EXPERTS = r"(.*\.experts\.(?:gate_up_proj|down_proj))"

# What a module is for; the first pattern that matches its path.
GROUPS = {
    "experts": r".*\.experts\.\w+",
    "embedding": r"model\.decoder\.embed_tokens",
    "attention": r"model\.decoder\.layers\.\d+\.self_attn\.\w_proj",
    "dense MLP": r"model\.decoder\.layers\.\d+\.mlp\.\w+",
    "router": r".*\.router\.proj",
    "self-conditioning": r"model\.decoder\.self_conditioning\.\w+_proj",
    "vision projection": r"model\.encoder\.embed_vision\.embedding_projection",
    "vision tower": r"model\.encoder\.vision_tower\..*",
    "norms and other": r".*",
}


def layout_name(published: str) -> str | None:
    """The MLX layout's name of a published tensor; None for one that is tied or computed and so dropped."""
    if any(re.fullmatch(pattern, published) for pattern in DROPPED):
        return None
    return f"{published}.weight" if re.fullmatch(BARE_EXPERTS, published) else published


def module_path(tensor: str) -> str:
    """The module that a tensor of the MLX layout belongs to: `weight`, `scales` and `biases` share theirs."""
    return re.sub(r"\.(weight|scales|biases|weight_scale_2)$", "", tensor)


def group_of(path: str) -> str:
    """The group of the module at `path`, a key of GROUPS."""
    return next(group for group, pattern in GROUPS.items() if re.fullmatch(pattern, path))


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of an unquantized checkpoint in the published layout."""
    text = config.text
    tensors: dict[str, Shape] = {"model.decoder.embed_tokens.weight": (text.vocab_size, text.hidden_size)}
    for i, layer in enumerate(text.layers):
        tensors |= _within(f"model.decoder.layers.{i}", _text_layer(text, layer))
    tensors["model.decoder.norm.weight"] = (text.hidden_size,)
    tensors |= _within("model.decoder.self_conditioning", _mlp(text.hidden_size, text.intermediate_size))
    tensors["model.decoder.self_conditioning.pre_norm.weight"] = (text.hidden_size,)
    if config.vision:
        projection = "model.encoder.embed_vision.embedding_projection.weight"
        tensors[projection] = (text.hidden_size, config.vision.hidden_size)
    tensors |= {f"model.encoder.language_model.layers.{i}.layer_scalar": (1,) for i in range(len(text.layers))}
    if config.vision:
        tensors |= _within("model.encoder.vision_tower", _vision_tower(config.vision))
    return tensors


def _text_layer(text: TextConfig, layer: LayerConfig) -> dict[str, Shape]:
    hidden, experts, width = text.hidden_size, text.num_experts, text.moe_intermediate_size
    queries, keys = text.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    tensors: dict[str, Shape] = {
        "experts.down_proj": (experts, hidden, width),
        "experts.gate_up_proj": (experts, 2 * width, hidden),
        "layer_scalar": (1,),
        "router.per_expert_scale": (experts,),
        "router.proj.weight": (experts, hidden),
        "router.scale": (hidden,),
        "self_attn.k_norm.weight": (layer.head_dim,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (layer.head_dim,),
        "self_attn.q_proj.weight": (queries, hidden),
    }
    if layer.is_sliding:  # full layers share the projection of keys and values
        tensors["self_attn.v_proj.weight"] = (keys, hidden)
    tensors |= _within("mlp", _mlp(hidden, text.intermediate_size))
    experts_norms = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
    return tensors | {f"{name}.weight": (hidden,) for name in (*_LAYER_NORMS, *experts_norms)}


def _vision_tower(vision: VisionConfig) -> dict[str, Shape]:
    hidden = vision.hidden_size
    tensors: dict[str, Shape] = {
        "patch_embedder.input_proj.weight": (hidden, 3 * vision.patch_size**2),
        "patch_embedder.position_embedding_table": (2, vision.position_embedding_size, hidden),
    }
    if vision.standardize:
        tensors |= {"std_bias": (hidden,), "std_scale": (hidden,)}
    for i in range(vision.num_hidden_layers):
        tensors |= _within(f"encoder.layers.{i}", _vision_layer(vision))
    return tensors


def _vision_layer(vision: VisionConfig) -> dict[str, Shape]:
    hidden, head = vision.hidden_size, vision.head_dim
    queries, keys = vision.num_attention_heads * head, vision.num_key_value_heads * head
    linears = _within("mlp", _mlp(hidden, vision.intermediate_size)) | {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
    }
    tensors = {name.replace(".weight", ".linear.weight"): shape for name, shape in linears.items()}
    if vision.use_clipped_linears:
        limits = ("input_min", "input_max", "output_min", "output_max")
        tensors |= {name.replace(".weight", f".{limit}"): () for name in linears for limit in limits}
    tensors |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    return tensors | {f"{name}.weight": (hidden,) for name in _LAYER_NORMS}


_LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _mlp(hidden: int, width: int) -> dict[str, Shape]:
    return {
        "gate_proj.weight": (width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
    }


def _within(prefix: str, tensors: dict[str, Shape]) -> dict[str, Shape]:
    return {f"{prefix}.{name}": shape for name, shape in tensors.items()}
