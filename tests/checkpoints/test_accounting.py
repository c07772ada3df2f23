"""Memory and operations computed from shapes: the true ones, and against what MLX really holds."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from convert_data import true_config, true_shapes
from mlx.utils import tree_flatten
from random_models import config_json, random_model

from mlx_diffusiongemma.benchmark.operations import EXPERTS, step_operations
from mlx_diffusiongemma.checkpoints import accounting
from mlx_diffusiongemma.config import FULL, SLIDING, ModelConfig
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma

CANVAS = 16
BYTES = {"U32": 4, "BF16": 2, "F32": 4}


def test_the_true_4_bit_checkpoint_fits_18_gb():
    weights = sum(math.prod(shape) * BYTES[dtype] for _, shape, dtype in true_shapes("mlx_4bit"))
    memory = accounting.memory_needed(ModelConfig.from_dict(true_config()), weights, 8192)
    assert memory.weights == weights
    assert memory.total <= 18e9
    assert memory.cache == pytest.approx(0.516e9, rel=0.01)


def test_rows_that_share_a_prefix_keep_to_their_budget():
    """Of the published model, nearly half a gigabyte a row after 8,192 tokens."""
    text = ModelConfig.from_dict(true_config()).text
    counts = [accounting.rows_at_once(text, 256, context, 16) for context in (0, 1024, 8192, 65536)]
    assert counts == sorted(counts, reverse=True) and 16 > counts[0] > 2 and counts[2:] == [1, 1]
    for context, rows in zip((0, 1024, 8192, 65536), counts, strict=True):
        assert rows == 1 or accounting.rows_bytes(text, 256, context, rows) <= 2**29
        assert accounting.rows_bytes(text, 256, context, rows + 1) > 2**29


def test_a_snapshot_is_what_the_sliding_layers_hold():
    config = ModelConfig.from_dict(true_config())
    assert accounting.memory_needed(config, 0, 8192).snapshot == pytest.approx(327e6, rel=0.01)


def test_the_operations_of_a_true_step():
    """2,532 GFLOP, of which the experts are 731: counted by hand for a canvas of 256 after 1,024 tokens."""
    model = DiffusionGemma(ModelConfig.from_dict(true_config()))  # its arrays are never computed
    operations = step_operations(model, 1024)
    assert sum(sum(kinds.values()) for kinds in operations.values()) == pytest.approx(2532e9, rel=1e-3)
    assert max(operations[EXPERTS].values()) == pytest.approx(731e9, rel=1e-3)  # beside the router


SHAPES = {
    "weights": (500, {"num_experts": 32, "hidden_size": 256, "moe_intermediate_size": 512}),
    "keys and values": (
        1100,
        {"num_key_value_heads": 16, "num_global_key_value_heads": 16, "head_dim": 128, "global_head_dim": 256}
        | {"num_attention_heads": 16},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_within_3_percent_of_the_real_memory(shape):
    context, sizes = SHAPES[shape]
    model = random_model(
        config_json([SLIDING] * 3 + [FULL], CANVAS, **sizes, vocab_size=8192, sliding_window=1024), None
    )
    model.fuse()
    mx.eval(model.parameters())
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    mx.clear_cache()
    before = mx.get_active_memory() - weights
    cache = model.make_cache()
    for _ in model.encode_chunks(mx.zeros((1, context), mx.int32), cache):
        pass
    canvas, soft, key = (
        mx.zeros((1, CANVAS), mx.int32),
        mx.zeros((1, CANVAS, model.config.text.hidden_size)),
        mx.random.key(0),
    )
    for _ in range(2):
        hidden = model.denoise(canvas, cache, soft)
        cache.settle()
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(model.read_vocabulary(hidden, 0.5, key))
    memory = accounting.memory_needed(model.config, weights, context, item=4)
    assert memory.cache == cache.nbytes
    assert memory.total == pytest.approx(mx.get_peak_memory() - before, rel=0.03)
