"""The memory that training needs, computed from a checkpoint's shapes before anything is loaded.

What layers keep for the gradient is counted from how they compute; the tests hold it to what MLX is seen to use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..checkpoints.memory import usable_bytes
from ..errors import TrainingError
from ..model.adapters import GROUPS, OF_THE_DECODER, keys_of
from ..model.budgets import BLOCK_BUDGET, BLOCK_TOKENS, BLOCKS_ALIVE, SCORE_BUDGET
from .draws import BUCKET

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from ..config import LayerConfig, TextConfig
    from .options import TrainingOptions

FLOAT = 4  # bytes of what is trained, its gradient and its moments
MOMENTS = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 0, "adafactor": 0}  # arrays of the optimizer beside each weight
# How often a backward pass has a layer's inner states: the kept ones' gradients, and all anew where they were not kept.
BACKWARD, BACKWARD_ANEW = 1.0, 1.7
SCORES = 2.5  # and its attention's scores


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of the frozen and trained weights; of gradients and the optimizer's moments; of what the layers keep for
    the gradient; and of the largest passing step, in a layer or the vocabulary.
    """

    weights: int
    optimizer: int
    kept: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.kept + self.step


def training_memory(checkpoint: Checkpoint, options: TrainingOptions, tokens: int | None = None) -> TrainingMemory:
    """Compute what a run on this checkpoint needs. tokens: of the longest example, prompt and whole canvases; None is
    the most that the options allow.
    """
    text, canvas, batch = checkpoint.config.text, checkpoint.config.canvas_length, options.batch_size
    tokens = options.max_seq_length + canvas - 1 if tokens is None else tokens
    read = -(-tokens // BUCKET) * BUCKET
    full = options.adapter.fine_tune_type == "full"
    item = FLOAT if full else checkpoint.item
    elements = _elements(checkpoint) if full else sum(_trained(text, options).values())
    weights = FLOAT * elements if full else checkpoint.nbytes + FLOAT * elements
    gradients = 2 if options.grad_accumulation_steps > 1 else 1
    inner = [_inner_bytes(text, layer, item, () if full else keys_of(options.adapter.keys)) for layer in text.layers]
    passed = [
        item * (read * (text.hidden_size + 2 * layer.num_key_value_heads * layer.head_dim) + canvas * text.hidden_size)
        for layer in text.layers
    ]
    scores = min(item * batch * text.num_attention_heads * read**2, SCORE_BUDGET)
    again = options.grad_checkpoint
    layer = int((BACKWARD_ANEW if again else BACKWARD) * batch * read * max(inner) + SCORES * scores)
    rows = batch * read
    vocabulary = BLOCKS_ALIVE * min(BLOCK_BUDGET, FLOAT * rows * min(text.vocab_size, BLOCK_TOKENS))
    return TrainingMemory(
        weights,
        FLOAT * elements * (gradients + MOMENTS[options.optimizer]),
        batch * (sum(passed) if again else (read + canvas) * sum(inner)),
        max(layer, vocabulary),
    )


def check_memory(checkpoint: Checkpoint, options: TrainingOptions, tokens: int | None = None) -> None:
    """Raises TrainingError where a run would need more memory than there is, with what would help."""
    limit, needed = usable_bytes(), training_memory(checkpoint, options, tokens).total
    if needed <= limit:
        return
    smaller = {
        "--grad-checkpoint": replace(options, grad_checkpoint=True),
        "--batch-size 1": replace(options, batch_size=1),
        "--grad-checkpoint --batch-size 1": replace(options, grad_checkpoint=True, batch_size=1),
    }
    fitting = (
        advice for advice, changed in smaller.items() if training_memory(checkpoint, changed, tokens).total <= limit
    )
    advice = next(fitting, "shorter examples (--max-seq-length) or a checkpoint with fewer bits")
    raise TrainingError(
        f"Training needs about {needed / 1e9:.1f} GB, and {limit / 1e9:.1f} GB can be used here; try {advice}."
    )


def _elements(checkpoint: Checkpoint) -> int:
    """Count the weights of a checkpoint that is not quantized."""
    return checkpoint.nbytes // checkpoint.item


def _trained(text: TextConfig, options: TrainingOptions) -> dict[str, int]:
    """Count the trained numbers by key, over all layers and towers."""
    adapter = options.adapter
    layers = text.layers[-adapter.num_layers :] if adapter.num_layers > 0 else text.layers
    counts: dict[str, int] = {}
    for key in keys_of(adapter.keys):
        own = key.startswith(OF_THE_DECODER)
        for layer in text.layers[:1] if own else layers:
            inputs, outputs = _widths(text, layer, key)
            count = adapter.rank * (inputs + outputs) + (outputs if adapter.fine_tune_type == "dora" else 0)
            count *= text.num_experts if key in GROUPS["experts"] else 1
            counts[key] = counts.get(key, 0) + count * (2 if adapter.towers == "separate" and not own else 1)
    return counts


def _widths(text: TextConfig, layer: LayerConfig, key: str) -> tuple[int, int]:
    """Inputs and outputs of a linear layer of this name; none of one that the layer does not have."""
    hidden, inner = text.hidden_size, text.intermediate_size
    heads, kv = text.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    return {
        "self_attn.q_proj": (hidden, heads),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv) if layer.is_sliding else (0, 0),
        "self_attn.o_proj": (heads, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
        "router.proj": (hidden, text.num_experts),
        "experts.gate_up_proj": (hidden, 2 * text.moe_intermediate_size),
        "experts.down_proj": (text.moe_intermediate_size, hidden),
        "self_conditioning.gate_proj": (hidden, inner),
        "self_conditioning.up_proj": (hidden, inner),
        "self_conditioning.down_proj": (inner, hidden),
    }[key]


def _inner_bytes(text: TextConfig, layer: LayerConfig, item: int, keys: tuple[str, ...]) -> int:
    """Bytes that a layer keeps of each token for its gradient: norms and residuals, projections and what is rotated,
    and the GELUs' chains, which nothing fuses under a gradient; and the inputs of adapted layers as float32.
    """
    kv, top_k = layer.num_key_value_heads * layer.head_dim, text.top_k_experts
    states = (
        (10 + top_k) * text.hidden_size
        + 5 * text.num_attention_heads * layer.head_dim
        + 3 * kv
        + 9 * text.intermediate_size
        + 8 * top_k * text.moe_intermediate_size
    )
    if item == FLOAT:
        return item * states
    copied = sum(
        _widths(text, layer, key)[0] * (top_k if key in GROUPS["experts"] else 1)
        for key in keys
        if not key.startswith(OF_THE_DECODER)
    )
    return item * states + FLOAT * copied
