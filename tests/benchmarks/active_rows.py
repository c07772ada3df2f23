"""What mode `turbo` costs and gains against the plain loop, on a checkpoint that answers "follow ab bc ca from a 20".

    python tests/benchmarks/active_rows.py CHECKPOINT [--prompts 300] [--seeds 5]

The answer begins with the letter asked for, and every letter is the one that the prompt says follows the last, so the
share of links that are right judges a reply. Both modes get the same prompts and seeds; intervals are 95 %, over
prompts. The exit status is 1 where a bar does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

from mlx_diffusiongemma import MODES, GenerationOptions, generate, load
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.generation.decoders.active_rows import ActiveRows
from mlx_diffusiongemma.generation.denoising import Pending

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEAST_LINKS, MOST_STEPS, MOST_ROWS = -1.0, 1.05, 0.70  # points; parts of the plain loop's


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(arguments.checkpoint, Path(scratch) / "float32", bits=None, dtype="float32")
        model, processor = load(Path(scratch) / "float32")
    length, rng = model.config.canvas_length, random.Random(0)
    questions = [question(rng) for _ in range(arguments.prompts)]
    # In [mode, prompt, seed]: the share of right links, steps, rows, seconds.
    links, steps, rows, seconds = np.zeros((4, 2, arguments.prompts, arguments.seeds))
    for i, asked in enumerate(questions):
        for seed in range(arguments.seeds):
            for mode, name in enumerate(("reference", "turbo")):
                options = GenerationOptions(max_tokens=length).filled_from(MODES[name])
                with rows_counted(length) as counted:
                    result = generate(model, processor, asked, options=options, seed=seed * len(questions) + i)
                steps[mode, i, seed] = sum(result.stats.steps)
                rows[mode, i, seed] = sum(counted) or steps[mode, i, seed] * length
                seconds[mode, i, seed] = result.stats.denoise_seconds
                links[mode, i, seed] = right_links(asked, result.text)
    return report(links, steps, rows, seconds)


@contextmanager
def rows_counted(length: int) -> Iterator[list[int]]:
    """A list that takes the rows of each step of active rows within this."""
    rows: list[int] = []
    dispatched = ActiveRows._dispatched

    def noted(run: ActiveRows, pending: Pending | None) -> Pending | None:
        if pending is not None:
            rows.append(run._size or length)
        return dispatched(run, pending)

    with patch.object(ActiveRows, "_dispatched", noted):
        yield rows


def question(rng: random.Random) -> str:
    """A cycle of five to eight letters, where to begin in it, and how many letters to write."""
    cycle = rng.sample(LETTERS, rng.randint(5, 8))
    pairs = sorted(a + b for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return f"follow {' '.join(pairs)} from {rng.choice(cycle)} {rng.randint(16, 48)}"


def right_links(asked: str, reply: str) -> float:
    """The share of letters, after the first, that follow from the one before them."""
    words = asked.split()
    follows = {pair[0]: pair[1] for pair in words[1:-3]}
    good = sum(follows.get(a) == b for a, b in itertools.pairwise(reply))
    return good / max(len(reply) - 1, int(words[-1]) - 1)


def report(links: np.ndarray, steps: np.ndarray, rows: np.ndarray, seconds: np.ndarray) -> int:
    """Print the comparison, [mode, prompt, seed] each; the exit status."""
    difference, interval = mean_and_interval(100 * (links[1] - links[0]))
    steps_ratio, rows_ratio = steps[1].sum() / steps[0].sum(), rows[1].sum() / rows[0].sum()
    of_step = (seconds[1].sum() / steps[1].sum()) / (seconds[0].sum() / steps[0].sum())
    _, steps_interval = mean_and_interval((steps[1] - steps[0]) / steps[0].mean())
    print(f"{links.shape[1]} prompts x {links.shape[2]} seeds; plain: {100 * links[0].mean():.2f} % of links, ", end="")
    print(f"{steps[0].mean():.2f} steps a canvas, {1e3 * seconds[0].sum() / steps[0].sum():.1f} ms a step")
    print(f"right links: {difference:+.2f} ± {interval:.2f} points")
    print(f"steps: {steps_ratio:.3f} ± {steps_interval:.3f} of the plain loop's")
    print(f"rows computed: {rows_ratio:.3f}, a step's: {rows_ratio / steps_ratio:.3f}")
    print(f"a step's time: {of_step:.3f}, a canvas's: {of_step * steps_ratio:.3f}")
    held = difference - interval > LEAST_LINKS and steps_ratio <= MOST_STEPS and rows_ratio <= MOST_ROWS
    print("the bars hold" if held else "THE BARS DO NOT HOLD")
    return 0 if held else 1


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of [prompt, seed], and half its 95 % interval: a prompt's seeds are not independent."""
    of_prompts = values.mean(axis=1)
    return float(values.mean()), float(1.96 * of_prompts.std(ddof=1) / len(of_prompts) ** 0.5)


if __name__ == "__main__":
    sys.exit(main())
