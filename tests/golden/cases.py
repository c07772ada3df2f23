"""Seeded random tiny models and their inputs, for comparing this model with Transformers'. Needs numpy alone.

A tensor is drawn from its name in the published layout and its shape, so each side fills the model that it built from
the configuration, and no weights are stored.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW = 8
SPECIAL = 4  # ids at the end of the vocabulary that inputs leave out: the image tokens among them
TEMPERATURE = 0.8

KINDS = {"S": "sliding_attention", "F": "full_attention"}
# Part of every published configuration; these models' tower is never run.
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "position_embedding_size": 8,
}
TEXT = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_experts": 8,
    "top_k_experts": 2,
    "sliding_window": WINDOW,
    "max_position_embeddings": 4096,
    "use_bidirectional_attention": "vision",
}


@dataclass(frozen=True)
class Case:
    """A model and what it is given: `layers` spells the kinds (S, F), `text` changes the text configuration, where
    None takes an entry out.
    """

    name: str
    layers: str
    prompt: int
    canvas: int
    rows: int = 1
    text: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The content of the model's config.json."""
        kinds = [KINDS[letter] for letter in self.layers]
        text = {**TEXT, "num_hidden_layers": len(kinds), "layer_types": kinds, **self.text}
        text = {name: value for name, value in text.items() if value is not None}
        first = text["vocab_size"] - SPECIAL
        return {
            "model_type": "diffusion_gemma",
            "canvas_length": self.canvas,
            "boi_token_id": first,
            "image_token_id": first + 1,
            "eoi_token_id": first + 2,
            "text_config": text,
            "vision_config": VISION,
        }

    def tokens(self, name: str) -> np.ndarray:
        """The prompt, or one canvas of that name, [rows, length]."""
        length = self.prompt if name == "prompt" else self.canvas
        high = self.config["text_config"]["vocab_size"] - SPECIAL
        return _generator(self.name, name).integers(0, high, (self.rows, length))

    def weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of that name in the published layout, float32.

        Queries are kept small and norms near 1: attention with scale 1 on plain random weights is so badly
        conditioned that float32 and float64 disagree by more than any test could allow.
        """
        random = _generator(self.name, name)
        if name.endswith("layer_scalar"):  # the one weight that encoder and decoder do not share
            low, high = (0.7, 0.9) if "encoder" in name else (1.1, 1.3)
            return random.uniform(low, high, shape).astype(np.float32)
        normal = random.standard_normal(shape, np.float32)
        if name.endswith("router.proj.weight"):
            return normal
        if len(shape) > 1:
            return normal / np.sqrt(np.float32(shape[-1]))
        size = 0.2 if "q_norm" in name else 4.0 if name == "model.decoder.norm.weight" else 1.0
        return np.float32(size) * (1 + np.float32(0.1) * normal)

    @staticmethod
    def processed(logits: np.ndarray) -> np.ndarray:
        """A first step's logits as its sampler leaves them to the second step."""
        return logits.astype(np.float32) / np.float32(TEMPERATURE)


def _generator(*names: str) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()) for name in names])


SAVED_BY_TRANSFORMERS = {
    "global_head_dim": None,
    "num_global_key_value_heads": None,
    "per_layer_config": {"04": {"head_dim": 32}, "09": {"head_dim": 32}},
}
OTHER_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 20_000.0},
}

CASES = [
    Case("a prompt of one token", "SSSSSF", prompt=1, canvas=16),
    Case("a prompt of window - 1", "SSSSSF", prompt=WINDOW - 1, canvas=16),
    Case("a prompt of one window", "SSSSSF", prompt=WINDOW, canvas=16),
    Case("a prompt of window + 1", "SSSSSF", prompt=WINDOW + 1, canvas=16),
    Case("a prompt of many windows", "SSSSSF", prompt=5 * WINDOW + 3, canvas=32),
    Case("a canvas of 64", "SSF", prompt=2 * WINDOW, canvas=64),
    Case("a window wider than the canvas", "SSF", prompt=43, canvas=16, text={"sliding_window": 40}),
    Case("a window wider than the prompt", "SSF", prompt=20, canvas=16, text={"sliding_window": 64}),
    Case("a full layer first", "FSSF", prompt=19, canvas=17),
    Case("alternating layers", "SFSFSF", prompt=19, canvas=16),
    Case("full layers only", "FF", prompt=19, canvas=16),
    Case("a last layer that says sliding", "SSSS", prompt=19, canvas=16),
    Case("one key-value head", "SSF", prompt=19, canvas=16, text={"num_key_value_heads": 1}),
    Case(
        "as many key-value heads as heads",
        "SSF",
        prompt=19,
        canvas=16,
        text={"num_key_value_heads": 4, "num_global_key_value_heads": None},
    ),
    Case(
        "as many key-value heads everywhere",
        "SSF",
        prompt=19,
        canvas=16,
        text={"num_key_value_heads": 2, "num_global_key_value_heads": 2},
    ),
    Case("sixteen experts, five of them", "SSF", prompt=19, canvas=16, text={"num_experts": 16, "top_k_experts": 5}),
    Case("one expert of three", "SSF", prompt=19, canvas=16, text={"num_experts": 3, "top_k_experts": 1}),
    Case("all of two experts", "SSF", prompt=19, canvas=16, text={"num_experts": 2, "top_k_experts": 2}),
    Case("two rows", "SSSSSF", prompt=19, canvas=16, rows=2),
    Case("two rows of one token", "SFSF", prompt=1, canvas=16, rows=2),
    Case("a configuration saved by Transformers", "SSSSFSSSSF", prompt=19, canvas=16, text=SAVED_BY_TRANSFORMERS),
    Case(
        "another soft cap, rotary base and epsilon",
        "SSF",
        prompt=19,
        canvas=16,
        text={"final_logit_softcapping": 7.0, "rope_parameters": OTHER_ROPE, "rms_norm_eps": 1e-4},
    ),
]
