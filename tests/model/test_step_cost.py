"""What a denoising step costs: launches, blocking reads, large arrays. These fail when a step grows."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from kernels import Graph, graph_of
from random_models import OPTIONS, config_json, in_mlx_vlm, random_model, true_pattern

from mlx_diffusiongemma.config import FULL
from mlx_diffusiongemma.generation.canvas import Canvas
from mlx_diffusiongemma.generation.denoising import Denoising, Job, Step
from mlx_diffusiongemma.generation.sampling import Draws
from mlx_diffusiongemma.model import layers, moe, vocabulary
from mlx_diffusiongemma.model.cache import Cache
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma

CANVAS, PREFIX, VOCABULARY = 32, 40, 128
COMPILED = [
    (layers, "geglu"),
    (moe, "geglu"),
    *(
        (vocabulary, name)
        for name in ("_process", "_exponentials", "_higher", "_joined_sums", "_joined_soft", "_rescaled")
    ),
]
TRUNK_BAR = 1332  # kernels of 30 layers; mlx-vlm 0.7.10 has 1,739 in its whole step
COPIES = {"Flatten": 2}  # per layer, of what does not lie together: heads after attention, the experts chosen
BLOCK_KERNELS = 13  # per vocabulary block
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")


def prefilled(model: DiffusionGemma):
    cache = model.make_cache()
    model.encode(mx.arange(PREFIX)[None] % VOCABULARY, cache)
    cache.evaluate()
    return cache


def trunk(bits: int | None, layer_count: int = 30) -> Graph:
    """From a canvas and a soft embedding to the hidden states."""
    model = random_model(config_json(true_pattern(layer_count), CANVAS), bits)
    model.fuse()
    mx.eval(model)
    cache = prefilled(model)
    inputs = mx.zeros((1, CANVAS), mx.int32), mx.zeros((1, CANVAS, 64))
    return graph_of(lambda canvas, soft: model.denoise(canvas, cache, soft), *inputs, compiled=COMPILED)


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4-bit"])
def test_launches_of_the_trunk(bits):
    graph = trunk(bits)
    assert graph.count <= TRUNK_BAR, graph.kernels
    per_layer = [trunk(bits, count).count for count in (6, 12)]
    assert (graph.count - per_layer[1]) / 18 == (per_layer[1] - per_layer[0]) / 6 <= 44


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4-bit"])
def test_copies_that_the_trunk_implies(bits):
    assert trunk(bits).copies == {name: 30 * count for name, count in COPIES.items()}


@pytest.mark.parametrize(
    ("work", "copies"),
    [
        (lambda x: mx.fast.rms_norm(x[:, :, 2:], None, 1e-6), {"rms_norm": 1}),
        (lambda x: mx.fast.rms_norm(x, None, 1e-6)[:, :, 2:] * 2, {}),
        (lambda x: mx.fast.rope(x.swapaxes(1, 2), 8, traditional=False, base=1e4, scale=1.0, offset=0), {}),
        (lambda x: x.swapaxes(1, 2).flatten(2), {"Flatten": 1}),
        (lambda x: x[:, :1].flatten(1), {}),
        (lambda x: x[..., :2] @ mx.zeros((2, 3)), {}),
        (lambda x: x[..., ::2] @ mx.zeros((4, 3)), {"Matmul": 1}),
        (lambda x: mx.softmax(sum(mx.split(x, 2, axis=-1)), axis=-1), {}),
        (lambda x: mx.softmax(mx.split(x, 2, axis=-1)[1], axis=-1), {"Softmax": 1}),
        (lambda x: mx.broadcast_to(x[:1], x.shape) + x, {}),
    ],
)
def test_copies_are_counted(work, copies):
    assert graph_of(work, mx.zeros((2, 5, 4, 8))).copies == copies


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4-bit"])
def test_keys_and_values_are_not_joined(bits):
    joined = [node for node in trunk(bits, 6).nodes if node.name in ("Concatenate", "Pad")]
    assert all(len(shape) < 4 for node in joined for shape in node.shapes)


def test_keys_and_values_are_written_in_place():
    """The prefix's K/V are 33 MB a layer here: a copy of them would be seen."""
    sizes = {"num_key_value_heads": 4, "num_global_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 128}
    model = random_model(config_json([FULL], 4, **sizes, global_head_dim=256), None)
    cache = model.make_cache()
    model.encode(mx.zeros((1, 4000), mx.int32), cache)
    cache.evaluate()
    canvas = mx.zeros((1, 4), mx.int32)
    for _ in range(2):
        hidden = model.denoise(canvas, cache)
        cache.settle()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(hidden, cache.arrays)
    assert cache.nbytes > 30e6
    assert mx.get_peak_memory() - before < cache.nbytes / 10


def read_graph(bits: int | None, blocks: int, monkeypatch) -> Graph:
    """Reading a vocabulary of `blocks` blocks."""
    model = random_model(config_json([FULL], CANVAS, vocab_size=blocks * 32), bits)
    monkeypatch.setattr(vocabulary, "BLOCK_BUDGET", 4 * CANVAS * 32)
    inputs = mx.zeros((1, CANVAS, 64)), mx.zeros((1, 2), mx.uint32)
    return graph_of(lambda hidden, key: tuple(model.read_vocabulary(hidden, 0.5, key)), *inputs, compiled=COMPILED)


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4-bit"])
def test_launches_per_vocabulary_block(bits, monkeypatch):
    counts = [read_graph(bits, blocks, monkeypatch).count for blocks in (4, 8, 16)]
    assert counts[1] - counts[0] <= 4 * BLOCK_KERNELS
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def largest_float32(graph: Graph) -> int:
    """Values in the graph's largest float32 array."""
    arrays = ((s, d) for node in graph.nodes for s, d in zip(node.shapes, node.dtypes, strict=True))
    return max(math.prod(shape) for shape, dtype in arrays if dtype == mx.float32)


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4-bit"])
def test_no_array_of_canvas_times_vocabulary(bits, monkeypatch):
    assert largest_float32(read_graph(bits, 512, monkeypatch)) <= CANVAS * 512 * 32 / 8


@contextmanager
def blocking_reads() -> Iterator[list[str]]:
    """What waits for the device, as it happens."""
    seen: list[str] = []

    def noted(name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            seen.append(name)
            return function(*arguments, **options)

        return call

    def noted_array(values, *arguments, **options):
        if isinstance(values, mx.array):
            seen.append("np.array")
        return original(values, *arguments, **options)

    original = np.array
    methods = {name: noted(name, getattr(mx.array, name)) for name in READS}
    with (
        patch.object(np, "array", noted_array),
        patch.object(mx, "eval", noted("eval", mx.eval)),
        patch.multiple(mx.array, **methods),
    ):
        yield seen


def denoise(model: DiffusionGemma, cache: Cache, starts: list[Canvas], seed: int) -> Iterator[list[Step]]:
    run = Denoising(model, OPTIONS, VOCABULARY)
    for row, start in enumerate(starts):
        run.add(Job(start, cache, Draws(seed, row)))
    return run.steps()


@pytest.mark.parametrize("rows", [1, 2])
def test_one_blocking_read_a_step(rows):
    model = random_model(config_json(true_pattern(6), CANVAS), None)
    cache = prefilled(model)
    starts = [Canvas([]).part(0, CANVAS)] * rows
    with blocking_reads() as seen:
        steps = list(denoise(model, cache, starts, seed=1))
    assert len(steps) == OPTIONS.max_steps
    assert seen == ["np.array"] * len(steps)


@pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")
@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4-bit"])
def test_the_trunk_launches_less_than_in_mlx_vlm(bits):
    from mlx_vlm.models.diffusion_gemma import language

    config = config_json(true_pattern(30), CANVAS)
    peer = in_mlx_vlm(random_model(config, bits), config, bits)
    cache = peer.make_cache()
    peer.diffusion_update_cache(mx.arange(PREFIX)[None], cache=cache)
    mx.eval([layer.state for layer in cache])
    inputs = mx.zeros((1, CANVAS), mx.int32), mx.zeros((1, CANVAS, 64))
    theirs = graph_of(
        lambda canvas, soft: peer.model.decoder(canvas, cache=cache, self_conditioning_embeddings=soft),
        *inputs,
        compiled=[(language, "geglu")],
    )
    assert trunk(bits).count < theirs.count


def test_the_loop_writes_keys_and_values_in_place():
    """The prefix's K/V are 33 MB here; canvas after canvas, none of it is copied."""
    sizes = {"num_key_value_heads": 4, "num_global_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 128}
    model = random_model(config_json([FULL], 4, **sizes, global_head_dim=256), None)
    cache = model.make_cache()
    model.encode(mx.zeros((1, 4000), mx.int32), cache)
    cache.evaluate()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in denoise(model, cache, [Canvas([]).part(0, 4)], seed=2):
        pass
    assert mx.get_peak_memory() - before < 0.5 * cache.nbytes


def test_scores_keep_to_their_budget(monkeypatch):
    queries, keys = mx.random.normal((1, 4, 1024, 64)), mx.random.normal((1, 4, 1024, 64))
    mx.eval(queries, keys)
    peaks = []
    for budget in (1 << 20, 1 << 30):
        monkeypatch.setattr(layers, "SCORE_BUDGET", budget)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(layers.attend(queries, keys, keys, "causal"))
        peaks.append(mx.get_peak_memory() - before)
    scores = 4 * 4 * 1024 * 1024
    assert peaks[0] < scores < peaks[1]
