"""Predictions for Apple's chips: what each decoder would reach, from a checkpoint's shapes and the chips' ceilings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..checkpoints.accounting import visible_tokens

if TYPE_CHECKING:
    from ..checkpoints.safetensors import Entry
    from ..config import ModelConfig


@dataclass(frozen=True)
class Prediction:
    """One chip's seconds for a denoising step of a whole canvas and for a token left to right, and what follows."""

    chip: str
    step_seconds: float
    token_seconds: float
    diffusion_tokens_per_second: float

    @property
    def autoregressive_tokens_per_second(self) -> float:
        return 1 / self.token_seconds

    @property
    def faster(self) -> str:
        """The decoder that is predicted to write faster."""
        return "ar" if self.autoregressive_tokens_per_second > self.diffusion_tokens_per_second else "diffusion"

    def to_dict(self) -> dict[str, Any]:
        return {
            "chip": self.chip,
            "step_seconds": self.step_seconds,
            "token_seconds": self.token_seconds,
            "diffusion_tokens_per_second": self.diffusion_tokens_per_second,
            "autoregressive_tokens_per_second": self.autoregressive_tokens_per_second,
            "faster": self.faster,
        }


def predict(config: ModelConfig, tensors: Mapping[str, Entry], context: int, item: int) -> list[Prediction]:
    """Predict what the chips in `chips.json` would reach after `context` tokens.

    A pass takes as long as its products or its reads take, whichever is longer, at the share of the ceilings that has
    been seen. item: bytes of an activation.
    """
    data = json.loads(resources.files(__package__).joinpath("chips.json").read_text())
    canvas, found = config.canvas_length, []
    for chip in data["chips"]:
        products = chip["teraflops"] * 1e12 * data["share_of_products"]
        reads = chip["gigabytes_per_second"] * 1e9 * data["share_of_bandwidth"]

        def seconds(rows: int, denoises: bool, products: float = products, reads: float = reads) -> float:
            needed = _operations(config, rows, context, denoises) / products
            return max(needed, _bytes(config, tensors, rows, context, item, denoises) / reads)

        step, token = seconds(canvas, True), seconds(1, False)
        found.append(Prediction(chip["name"], step, token, canvas / (data["steps_per_canvas"] * step)))
    return found


def _operations(config: ModelConfig, rows: int, context: int, denoises: bool) -> int:
    """Floating-point operations of a pass over so many rows."""
    text = config.text
    hidden, heads = text.hidden_size, text.num_attention_heads
    # Read and, to condition the next step, weighted; the projections of self-conditioning beside that.
    elements = text.vocab_size * hidden * (2 if denoises else 1) + 3 * hidden * text.intermediate_size * denoises
    attended = 0
    for layer in text.layers:
        projections = heads + layer.num_key_value_heads * (2 if layer.is_sliding else 1) + heads
        elements += hidden * layer.head_dim * projections
        elements += 3 * hidden * (text.intermediate_size + text.top_k_experts * text.moe_intermediate_size)
        elements += hidden * text.num_experts
        attended += 4 * heads * layer.head_dim * (visible_tokens(layer, text, context) + rows)
    return rows * (2 * elements + attended)


def _bytes(
    config: ModelConfig, tensors: Mapping[str, Entry], rows: int, context: int, item: int, denoises: bool
) -> float:
    """Bytes that a pass over so many rows reads: of the experts those that some row is expected to choose."""
    text = config.text
    chosen = 1 - (1 - text.top_k_experts / text.num_experts) ** rows
    total = 0.0
    for name, entry in tensors.items():
        if not name.startswith("model.decoder.") or (".self_conditioning." in name and not denoises):
            continue
        share = chosen if ".experts." in name else 2 if denoises and ".embed_tokens." in name else 1
        total += entry.nbytes * share
    keys = sum(
        layer.num_key_value_heads * layer.head_dim * visible_tokens(layer, text, context) for layer in text.layers
    )
    return total + 2 * item * keys
