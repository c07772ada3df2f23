"""Denoising steps at the published sizes with random weights: milliseconds, and what rows cost together.

    python tests/benchmarks/true_shapes.py [--bits 4] [--rows 1 2 4 8] [--prefix 1024] [--layers 30]

For a machine with room for the weights (52 GB in bfloat16, 17 GB in 4 bits) and a GPU. Every row follows a prefix of
its own; `step` is the model's step alone, `loop` a whole canvas by the loop, per step. Random weights say nothing about
text, and the experts that random rows reach are spread as evenly as can be.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent))
from convert_data import true_config
from random_models import OPTIONS, random_model

from mlx_diffusiongemma.generation.canvas import Canvas
from mlx_diffusiongemma.generation.denoising import Denoising, Job
from mlx_diffusiongemma.generation.sampling import Draws
from mlx_diffusiongemma.model.cache import Cache, CacheRows
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma

STEPS = 12


def step_seconds(model: DiffusionGemma, caches: list[Cache], canvas: int) -> float:
    """The median of ten steps, each after the last."""
    cache = caches[0] if len(caches) == 1 else CacheRows(caches)
    rows = len(caches)
    tokens = mx.random.randint(0, 1000, (rows, canvas), key=mx.random.key(0))
    keys = mx.random.split(mx.random.key(1), rows)
    soft, seconds = mx.zeros((rows, canvas, model.config.text.hidden_size), model.dtype), []
    for _ in range(13):
        started = time.perf_counter()
        hidden = model.denoise(tokens, cache, soft)
        reading = model.read_vocabulary(hidden, 0.6, keys)
        cache.settle()
        mx.eval(reading)
        seconds.append(time.perf_counter() - started)
    cache.release()
    return statistics.median(seconds[3:])


def loop_seconds(model: DiffusionGemma, caches: list[Cache], canvas: int) -> float:
    """A step of whole canvases that never stop early."""
    run = Denoising(model, replace(OPTIONS, max_steps=STEPS, canvas_length=canvas), model.config.text.vocab_size)
    for row, cache in enumerate(caches):
        run.add(Job(Canvas([]).part(0, canvas), cache, Draws(row)))
    started = time.perf_counter()
    assert len(list(run.steps())) == STEPS
    return (time.perf_counter() - started) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    asked = parser.parse_args()
    config = true_config()
    text = config["text_config"]
    text |= {"num_hidden_layers": asked.layers, "layer_types": text["layer_types"][: asked.layers]}
    model = random_model({**config, "vision_config": None}, asked.bits, mx.bfloat16)
    model.fuse()
    canvas = model.config.canvas_length
    caches = [model.make_cache(snapshot_bytes=0) for _ in range(max(asked.rows))]
    for row, cache in enumerate(caches):
        for _ in model.encode_chunks(mx.full((1, asked.prefix + row), 7, mx.int32), cache):
            pass
    print(
        f"{mx.device_info().get('device_name')}, mlx {mx.__version__}, {asked.bits or 16} bits, prefix {asked.prefix}"
    )
    print("| rows | step, ms | loop, ms a step | ms a row |\n|---:|---:|---:|---:|")
    for rows in asked.rows:
        step, loop = (1000 * seconds(model, caches[:rows], canvas) for seconds in (step_seconds, loop_seconds))
        print(f"| {rows} | {step:.1f} | {loop:.1f} | {loop / rows:.1f} |", flush=True)
    print(f"peak {mx.get_peak_memory() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
