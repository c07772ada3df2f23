"""Many requests in one process: memory ends where it began, and no request is slower for what ran before it.

    python tests/benchmarks/many_requests.py [--requests 300] [--checkpoint DIRECTORY]
    python tests/benchmarks/many_requests.py --long

Without a checkpoint, the demo's is converted first, to float32: a CPU is slow at bfloat16. --long encodes 100,000
tokens through two small layers instead. Exits 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from convert_data import DEMO
from random_models import config_json, random_model

from mlx_diffusiongemma import load
from mlx_diffusiongemma.config import FULL, SLIDING
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.events import Draft
from mlx_diffusiongemma.generation.replying import stream
from mlx_diffusiongemma.options import GenerationOptions

LONGEST = 3000
PROBE_TOKENS, PROBE_EVERY = 200, 10
STEPS = 2  # a canvas; more would only take longer
CACHE_BOUND = 1 << 30  # bytes of freed buffers that MLX may keep


class Failures:
    """Bounds and what was measured, printed as they come."""

    def __init__(self) -> None:
        self.count = 0

    def check(self, what: str, value: float, bound: float, unit: str) -> None:
        kept = value <= bound
        self.count += not kept
        print(f"{'ok  ' if kept else 'FAIL'} {what}: {value:.2f} {unit}, at most {bound:.2f}")


class Requests:
    """One model that answers random prompts of given lengths."""

    def __init__(self, directory: Path):
        self.model, self.processor = load(directory)
        self.options = GenerationOptions(max_steps=STEPS, max_tokens=self.model.config.canvas_length, confidence=0.0)

    def events(self, length: int, seed: int):
        tokens = np.random.default_rng(seed).integers(32, self.model.config.text.vocab_size, length).tolist()
        return stream(self.model, self.processor, tokens, options=self.options, seed=seed)

    def seconds(self, length: int, seed: int) -> float:
        started = time.perf_counter()
        for _ in self.events(length, seed):
            pass
        return time.perf_counter() - started


def check_requests(directory: Path, count: int, failures: Failures) -> None:
    requests = Requests(directory)
    lengths = np.random.default_rng(0).integers(1, LONGEST + 1, count)
    probes, active, cached = [], [], []
    for number, length in enumerate(lengths.tolist()):
        requests.seconds(length, number)
        active.append(mx.get_active_memory())
        cached.append(mx.get_cache_memory())
        if number % PROBE_EVERY == PROBE_EVERY - 1:
            requests.seconds(PROBE_TOKENS, 0)
            probes.append(requests.seconds(PROBE_TOKENS, 0))
    growth = (active[-1] / active[9] - 1) * 100
    failures.check("active memory after the last request, against the tenth", growth, 2, "% more")
    failures.check("freed buffers kept at most", max(cached) / 1e6, CACHE_BOUND / 1e6, "MB")
    third = max(len(probes) // 3, 1)
    slower = (np.median(probes[-third:]) / np.median(probes[:third]) - 1) * 100
    failures.check(f"a {PROBE_TOKENS}-token request in the last third, against the first", slower, 15, "% slower")


def check_closing(directory: Path, failures: Failures) -> None:
    """An iterator closed in the middle of a canvas frees what the request held."""
    requests = Requests(directory)
    requests.seconds(LONGEST, 0)
    before = mx.get_active_memory()
    events = requests.events(LONGEST, 1)
    next(event for event in events if isinstance(event, Draft))
    held = mx.get_active_memory() - before
    events.close()
    mx.synchronize()  # what was under way when it closed ends first
    left = mx.get_active_memory() - before
    failures.check(f"left of {held / 1e6:.1f} MB after closing mid-canvas", left / 1e6, held / 1e6 / 100, "MB")


def check_long_prompt(tokens: int, failures: Failures) -> None:
    """What prefill holds beside the cache does not grow with the number of chunks."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 1024}
    model = random_model(config_json([SLIDING, FULL], 64, **sizes), None)
    prompt = mx.random.randint(0, 128, (1, tokens), key=mx.random.key(0))
    mx.eval(prompt)
    cache, beside, started = model.make_cache(), [], time.perf_counter()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for done in model.encode_chunks(prompt, cache):
        beside.append((mx.get_peak_memory() - before - 2 * cache.nbytes) / 1e6)
        mx.reset_peak_memory()
        if len(beside) % 10 == 0:
            print(f"     {done:,} tokens, {time.perf_counter() - started:.0f} s, {beside[-1]:.0f} MB beside the cache")
    half = len(beside) // 2
    # Scores grow with the prefix until their budget; after that nothing does.
    bound = max(beside[:half]) * 1.05 + 1
    failures.check("beside the cache, second half of the chunks", max(beside[half:]), bound, "MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the long prompt")
    arguments = parser.parse_args()
    failures = Failures()
    if arguments.long:
        check_long_prompt(arguments.tokens, failures)
        sys.exit(failures.count > 0)
    with tempfile.TemporaryDirectory() as temporary:
        directory = (
            arguments.checkpoint or convert_checkpoint(DEMO, Path(temporary) / "demo", bits=None, dtype="float32").out
        )
        check_requests(directory, arguments.requests, failures)
        check_closing(directory, failures)
    sys.exit(failures.count > 0)


if __name__ == "__main__":
    main()
