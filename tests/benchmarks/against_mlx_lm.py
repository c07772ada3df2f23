"""A token of the autoregressive decoder here and of mlx-lm's `gemma4_text`, on the same arrays, in one process.

    python tests/benchmarks/against_mlx_lm.py [--pairs 10] [--tokens 16] [--hidden 128] [--vocabulary 4096] [--bits 4]

30 layers with the true head counts, head sizes, window and number of experts, and a small hidden size, so that what is
compared is all but the products: attention over the prefix, the cache, building and dispatching graphs. After prefixes
of 100 and 4,000 tokens, greedily and with mlx-lm's sampler at temperature 1, top-p 0.95 and top-k 64. The two take
turns; each pair gives a ratio of times (ours / theirs), and the median of the ratios is shown with the 95 % interval of
a bootstrap. That both write the same tokens greedily is checked first. Peaks are what a run holds above what was there.
"""

from __future__ import annotations

import argparse
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from against_mlx_vlm import TRUE
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from random_models import config_json, in_mlx_lm, random_model, true_pattern
from scripted import ByteProcessor

from mlx_diffusiongemma import GenerationOptions, stream
from mlx_diffusiongemma.events import Commit

LAYERS = 30
PREFIXES = (100, 4000)
SAMPLERS = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.0, "top_p": 0.95, "top_k": 64}}


class Run(NamedTuple):
    """A reply's tokens, the seconds from the first of them to the last for each, and peak bytes above the prefix's."""

    tokens: list[int]
    seconds: float
    peak: int


class Processor(ByteProcessor):
    """Gives text for any vocabulary."""

    def draft_text(self, tokens):
        return "".join(chr(token % 64 + 32) for token in tokens)


def ours(model, prompt: list[int], cache, options: GenerationOptions) -> Run:
    tokens: list[int] = []
    times: list[float] = []
    peak_of: list[int] = []
    for event in stream(model, Processor(), prompt, options=options, cache=cache):
        if isinstance(event, Commit):
            if not times:
                peak_of.append(start_peak())
            times.append(time.perf_counter())
            tokens += event.tokens
    return Run(tokens, (times[-1] - times[0]) / (len(times) - 1), mx.get_peak_memory() - peak_of[0])


def theirs(peer, prompt: list[int], cache, options: GenerationOptions) -> Run:
    sampler = make_sampler(options.temperature, top_p=options.top_p or 0.0, top_k=options.top_k or 0)
    tokens: list[int] = []
    times: list[float] = []
    peak_of: list[int] = []
    last, kept = mx.array(prompt[-1:]), deepcopy(cache)
    mx.eval([layer.state for layer in kept])
    steps = generate_step(last, peer, max_tokens=options.max_tokens, sampler=sampler, prompt_cache=kept)
    for token, _ in steps:
        if not times:
            peak_of.append(start_peak())
        times.append(time.perf_counter())
        tokens.append(token)
    return Run(tokens, (times[-1] - times[0]) / (len(times) - 1), mx.get_peak_memory() - peak_of[0])


def prefixes(model, peer, tokens: list[int]):
    """A cache of each with the same random keys and values: computing those of 4,000 tokens takes minutes."""
    text = model.config.text
    arrays: dict[str, mx.array] = {}
    theirs = make_prompt_cache(peer)
    for number, (layer, their) in enumerate(zip(text.layers, theirs, strict=True)):
        length = min(len(tokens), text.sliding_window) if layer.is_sliding else len(tokens)
        shape = 1, layer.num_key_value_heads, length, layer.head_dim
        for place, name in enumerate(("keys", "values")):
            arrays[f"layers.{number}.{name}"] = mx.random.normal(shape, key=mx.random.key(2 * number + place))
        their.keys, their.values = arrays[f"layers.{number}.keys"], arrays[f"layers.{number}.values"]
        their.offset = len(tokens)
        if layer.is_sliding:
            their._idx = length
    ours = model.make_cache()
    ours.adopt(arrays, list(tokens))
    ours.snapshot()
    return ours, theirs


def start_peak() -> int:
    mx.reset_peak_memory()
    return mx.get_active_memory()


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Their median, and the 95 % interval of a bootstrap of it."""
    picks = np.random.default_rng(0).choice(np.array(ratios), (10_000, len(ratios)))
    low, high = np.quantile(np.median(picks, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--bits", type=int)
    arguments = parser.parse_args()
    small = {"hidden_size": arguments.hidden, "intermediate_size": 128, "moe_intermediate_size": 64}
    text = TRUE | small | {"vocab_size": arguments.vocabulary}
    config = config_json(true_pattern(LAYERS), 256, **text)
    model = random_model(config, arguments.bits)
    peer = in_mlx_lm(model, config, arguments.bits)
    model.fuse()
    mx.eval(model.parameters())
    random = np.random.default_rng(0)
    for length in PREFIXES:
        prompt = [int(token) for token in random.integers(0, arguments.vocabulary, length)]
        my_cache, their_cache = prefixes(model, peer, prompt[:-1])
        for name, sampler in SAMPLERS.items():
            options = GenerationOptions(decoder="autoregressive", max_tokens=arguments.tokens, seed=0, **sampler)
            mine, other = ours(model, prompt, my_cache, options), theirs(peer, prompt, their_cache, options)
            if name == "greedy" and mine.tokens != other.tokens:
                raise SystemExit(f"The two write different tokens: {mine.tokens} and {other.tokens}.")
            pairs = []
            for number in range(arguments.pairs):
                if number % 2:
                    other, mine = theirs(peer, prompt, their_cache, options), ours(model, prompt, my_cache, options)
                else:
                    mine, other = ours(model, prompt, my_cache, options), theirs(peer, prompt, their_cache, options)
                pairs.append((mine, other))
            median, low, high = interval([mine.seconds / other.seconds for mine, other in pairs])
            own, their = (float(np.median([pair[side].seconds for pair in pairs])) * 1000 for side in (0, 1))
            peaks = [max(pair[side].peak for pair in pairs) / 1e6 for side in (0, 1)]
            print(
                f"{length:5} tokens before, {name}: {own:.1f} ms a token, mlx-lm {their:.1f}: "
                f"{median:.2f} ({low:.2f}–{high:.2f}); peak {peaks[0]:.1f} MB, mlx-lm {peaks[1]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
