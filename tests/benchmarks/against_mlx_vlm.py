"""A denoising step here and in mlx-vlm, on the same arrays, in one process.

    python tests/benchmarks/against_mlx_vlm.py [vocabulary step layers true] [--pairs 10] [--json times.json]

mlx-vlm runs with the reference's sampler (`diffusion_sampler="entropy-bound"`, temperature 1, full canvas). The two
take turns; each pair gives a ratio of times (theirs / ours), and the median of the ratios is shown with the 95 %
interval of a bootstrap. What both compute is compared first, and a difference ends the run. Peaks are what the work
holds above its weights. Weights are float32 where nothing else is said.

    vocabulary  from hidden states to a sample, entropies and the soft embedding: V = 262,144, hidden 64
    step        whole canvases of 3 steps by each one's own loop: V = 262,144, hidden 128, 2 layers
    layers      one sliding and one full layer at the true sizes, experts in 4 bits, the rest in 8, canvas 64: hidden
                states only
    true        all 30 layers at the true sizes in bfloat16, canvas 256: hidden states only, and only on a CUDA device
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import mlx_vlm
from mlx_vlm.generate import diffusion
from mlx_vlm.models.diffusion_gemma import Model
from random_models import OPTIONS, config_json, in_mlx_vlm, random_model, true_pattern

from mlx_diffusiongemma.config import FULL, SLIDING
from mlx_diffusiongemma.generation.canvas import Canvas
from mlx_diffusiongemma.generation.denoising import Denoising, Job
from mlx_diffusiongemma.generation.sampling import Draws
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma

VOCABULARY = 262_144
TEMPERATURE = 0.6
STEPS = 3
PREFIX = 40
TRUE = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_experts": 128,
    "top_k_experts": 8,
    "sliding_window": 1024,
}


@dataclass
class Contest:
    """One shape. `ours` and `theirs` do the same work once and wait for it; `units` of it make one call."""

    name: str
    ours: Callable[[], None]
    theirs: Callable[[], None]
    units: int = 1


@dataclass
class Score:
    """Seconds per unit of work, and peak bytes above what was there before."""

    name: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    our_peak: int = 0
    their_peak: int = 0

    def ratio(self) -> tuple[float, float, float]:
        """The median of the paired ratios, and the 95 % interval of a bootstrap of it."""
        ratios = np.array(self.theirs) / np.array(self.ours)
        picks = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
        low, high = np.quantile(np.median(picks, axis=1), [0.025, 0.975])
        return float(np.median(ratios)), float(low), float(high)


def run(contest: Contest, pairs: int) -> Score:
    score = Score(contest.name, our_peak=peak(contest.ours), their_peak=peak(contest.theirs))
    for number in range(pairs):
        turns = [(contest.ours, score.ours), (contest.theirs, score.theirs)]
        for work, times in turns if number % 2 == 0 else turns[::-1]:
            started = time.perf_counter()
            work()
            times.append((time.perf_counter() - started) / contest.units)
    return score


def peak(work: Callable[[], None]) -> int:
    """Bytes beyond what is held before; the call also warms up."""
    work()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory() - before


def require(what: str, error: float, bound: float) -> None:
    if not error <= bound:
        raise SystemExit(f"{what}: the two differ by {error:.3g}, more than {bound:g}.")


def largest_difference(ours: mx.array, theirs: mx.array) -> float:
    """Relative to the largest value."""
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    return (mx.abs(ours - theirs).max() / mx.abs(theirs).max()).item()


def vocabulary_contests(bits: int | None) -> Iterator[Contest]:
    config = config_json([FULL], 256, vocab_size=VOCABULARY)
    model = random_model(config, bits)
    peer = in_mlx_vlm(model, config, bits)
    for rows in (64, 256):
        hidden = mx.random.normal((1, rows, 64), key=mx.random.key(1))
        mx.eval(hidden)
        check_vocabulary(model, peer, hidden)
        yield Contest(
            f"vocabulary, {rows} rows",
            lambda hidden=hidden: mx.eval(model.read_vocabulary(hidden, TEMPERATURE, mx.random.key(2))),
            lambda hidden=hidden: mx.eval(their_reading(peer, hidden)),
        )


def their_reading(peer: Model, hidden: mx.array) -> list[mx.array]:
    """What mlx-vlm's loop computes of hidden states in one step; its entropy once, as while the canvas changes."""
    logits = peer._softcap(peer.model.decoder.embed_tokens.as_linear(hidden)) / TEMPERATURE
    tokens = mx.argmax(logits, axis=-1)
    sample = diffusion._diffusion_sample_canvas(logits, mx.int32, 1.0)
    entropy = diffusion._diffusion_token_entropy(logits)
    conditioning = peer.diffusion_self_conditioning(logits, peer.diffusion_prepare_self_conditioning())
    if peer.model.decoder.prefers_logits_self_conditioning:
        conditioning = their_soft_embedding(peer, conditioning)
    return [tokens, sample, entropy, conditioning]


def their_soft_embedding(peer: Model, logits: mx.array) -> mx.array:
    """The part of `DecoderModel._embed_canvas` that makes a soft embedding of logits."""
    decoder = peer.model.decoder
    seen: list[mx.array] = []
    self_conditioning, decoder.self_conditioning = decoder.self_conditioning, lambda embeds, soft: seen.append(soft)
    decoder._embed_canvas(mx.zeros(logits.shape[:-1], mx.int32), self_conditioning_logits=logits)
    decoder.self_conditioning = self_conditioning
    return seen[0]


def check_vocabulary(model: DiffusionGemma, peer: Model, hidden: mx.array) -> None:
    ours = model.read_vocabulary(hidden, TEMPERATURE, mx.random.key(2))
    tokens, _, entropy, soft = their_reading(peer, hidden)
    if not mx.array_equal(ours.tokens, tokens):
        raise SystemExit("The argmax tokens differ.")
    require("entropy", mx.abs(ours.entropy - entropy).max().item(), 5e-3)
    require("soft embedding", largest_difference(ours.soft_embedding, soft), 1e-3)
    entropy, soft = exactly(model, hidden[:, :8])
    require("our entropy against float64", np.abs(np.array(ours.entropy)[:, :8] - entropy).max(), 1e-5)
    error = np.abs(np.array(ours.soft_embedding)[:, :8] - soft).max() / np.abs(soft).max()
    require("our soft embedding against float64", error, 1e-5)


def exactly(model: DiffusionGemma, hidden: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Entropies in nats and soft embeddings in float64, of float32 logits."""
    scaled = np.array(model.logits(hidden)).astype(np.float64) / TEMPERATURE
    shifted = scaled - scaled.max(-1, keepdims=True)
    weights = np.exp(shifted)
    mass = weights.sum(-1, keepdims=True)
    entropy = np.log(mass[..., 0]) - (weights * shifted).sum(-1) / mass[..., 0]
    return entropy, weights / mass @ np.array(model.embed(mx.arange(VOCABULARY))).astype(np.float64)


class NoText:
    """The tokenizer and streaming detokenizer that mlx-vlm's loop asks for, without any text."""

    last_segment = ""

    @property
    def detokenizer(self) -> NoText:
        return self

    def stopping_criteria(self, token: int) -> bool:
        return False

    def reset(self) -> None: ...

    def add_token(self, token: int, skip_special_token_ids: list[int]) -> None: ...

    def finalize(self) -> None: ...


def step_contests(bits: int | None) -> Iterator[Contest]:
    for canvas in (64, 256):
        config = config_json([SLIDING, FULL], canvas, vocab_size=VOCABULARY, hidden_size=128)
        config["generation_config"] = {"confidence_threshold": 0.0, "stability_threshold": 1}
        model = random_model(config, bits)
        peer = in_mlx_vlm(model, config, bits)
        check_hidden(model, peer, canvas, 1e-4)
        yield Contest(
            f"step, canvas {canvas}",
            lambda model=model, canvas=canvas: our_canvas(model, canvas),
            lambda peer=peer, canvas=canvas: their_canvas(peer, canvas),
            STEPS,
        )


def our_canvas(model: DiffusionGemma, length: int) -> None:
    cache = model.make_cache()
    model.encode(mx.arange(PREFIX)[None], cache)
    start = Canvas([]).part(0, length)
    run = Denoising(model, OPTIONS, VOCABULARY)
    run.add(Job(start, cache, Draws(seed=1)))
    for _ in run.steps():
        pass


def their_canvas(peer: Model, length: int) -> None:
    mx.random.seed(1)
    silent = NoText()
    events = diffusion.stream_diffusion_generate(
        peer,
        silent,
        silent,
        mx.arange(PREFIX)[None],
        None,
        None,
        max_tokens=length,
        skip_special_token_ids=[],
        temperature=1.0,
        max_denoising_steps=STEPS,
        diffusion_full_canvas=True,
        diffusion_sampler="entropy-bound",
    )
    for _ in events:
        pass


def layers_contests(bits: int | None) -> Iterator[Contest]:
    canvas, config = 64, config_json([SLIDING, FULL], 64, **TRUE)
    yield hidden_contest("layers, canvas 64", random_model(config, bits), config, bits, canvas)


def true_contests(bits: int | None) -> Iterator[Contest]:
    if mx.default_device() != mx.gpu or not mx.cuda.is_available():
        print("true: left out, no CUDA device here")
        return
    config = config_json(true_pattern(30), 256, vocab_size=VOCABULARY, **TRUE)
    yield hidden_contest("true, canvas 256", random_model(config, None, mx.bfloat16), config, None, 256)


def hidden_contest(
    name: str, model: DiffusionGemma, config: dict[str, object], bits: int | None, canvas: int
) -> Contest:
    peer = in_mlx_vlm(model, config, bits)
    ours, theirs = check_hidden(model, peer, canvas, 1e-4 if bits else 3e-2)
    return Contest(name, lambda: mx.eval(ours()), lambda: mx.eval(theirs()))


def check_hidden(
    model: DiffusionGemma, peer: Model, canvas: int, bound: float
) -> tuple[Callable[[], mx.array], Callable[[], mx.array]]:
    """Each one's hidden states of a canvas after a prefix, as functions, once they were seen to agree."""
    if mx.default_device() == mx.gpu:  # as `load` does
        model.fuse()
    prefix = mx.arange(PREFIX)[None]
    cache, their_cache = model.make_cache(), peer.make_cache()
    model.encode(prefix, cache)
    their_cache = peer.diffusion_update_cache(prefix, cache=their_cache)
    mx.eval(cache.arrays, [layer.state for layer in their_cache])
    tokens = mx.random.randint(0, 128, (1, canvas), key=mx.random.key(3))
    soft = model.embed(mx.random.randint(0, 128, (1, canvas), key=mx.random.key(4)))
    name = "self_conditioning_embeddings"

    def ours() -> mx.array:
        hidden = model.denoise(tokens, cache, soft)
        cache.settle()
        return hidden

    def theirs() -> mx.array:
        return peer.model.decoder(tokens, cache=their_cache, **{name: soft})

    require("hidden states", largest_difference(ours(), theirs()), bound)
    return ours, theirs


CONTESTS = {
    "vocabulary": vocabulary_contests,
    "step": step_contests,
    "layers": layers_contests,
    "true": true_contests,
}
# A CPU multiplies quantized matrices so slowly that a head of 8 bits would hide everything else.
BITS = {"vocabulary": None, "step": None, "layers": 4, "true": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(CONTESTS), choices=[*CONTESTS, []])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--bits", type=int, help="of the experts, 8 elsewhere; 0 quantizes nothing; see above")
    parser.add_argument("--json", type=Path, help="write the raw times there")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {mx.default_device()}, mlx {mx.__version__}, mlx-vlm {mlx_vlm.__version__}")
    print(f"{'':<22}{'ours':>10}{'theirs':>11}{'ratio':>8}{'95 %':>14}{'peak':>9}{'theirs':>10}{'load':>7}")
    scores = []
    for shape in arguments.shapes:
        bits = BITS[shape] if arguments.bits is None else arguments.bits or None
        for contest in CONTESTS[shape](bits):
            score = run(contest, arguments.pairs)
            scores.append(score)
            median, low, high = score.ratio()
            times = f"{np.median(score.ours) * 1e3:>8.0f}ms{np.median(score.theirs) * 1e3:>9.0f}ms"
            peaks = f"{score.our_peak / 1e6:>7.0f}MB{score.their_peak / 1e6:>8.0f}MB"
            interval = f"{low:.2f}–{high:.2f}"
            print(f"{score.name:<22}{times}{median:>8.2f}{interval:>14}{peaks}{os.getloadavg()[0]:>7.1f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(score) for score in scores], indent=1))


if __name__ == "__main__":
    main()
