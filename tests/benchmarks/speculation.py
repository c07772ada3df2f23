"""What speculative drafts give, by their length and steps, on a checkpoint that writes left to right as well.

    python tests/benchmarks/speculation.py CHECKPOINT PROMPTS.jsonl [--count 30] [--temperature 0]

PROMPTS.jsonl: lines with a "prompt". For each shape of a draft, and for the plan that adapts: the tokens that a causal
pass gives, the tokens that a pass of any kind gives, and the rows computed for each token, which for the autoregressive
decoder is 1. At temperature 0, that every text is the autoregressive decoder's is checked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest.mock import patch

from mlx_diffusiongemma import GenerationOptions, generate, load
from mlx_diffusiongemma.generation.decoders import speculative
from mlx_diffusiongemma.generation.decoders.plans import AdaptivePlan, FixedPlan, Plan

LENGTHS, STEPS = (16, 32, 64, 128), (1, 4, 8)


class Counted:
    """A plan whose shapes are remembered."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.shapes = plan, []

    def start(self) -> Counted:
        return self

    def shape(self) -> tuple[int, int]:
        self.shapes.append(self.plan.shape())
        return self.shapes[-1]

    def learn(self, drafted: int, kept: int) -> None:
        self.plan.learn(drafted, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    model, processor = load(arguments.checkpoint)
    lines = arguments.prompts.read_text().splitlines()[: arguments.count]
    prompts = [json.loads(line)["prompt"] for line in lines]
    options = GenerationOptions(decoder="autoregressive", temperature=arguments.temperature, seed=0)
    expected = [generate(model, processor, prompt, options=options).tokens for prompt in prompts]
    options = options.with_decoder("speculative")
    shapes = [(length, steps) for length in LENGTHS if length <= model.config.canvas_length for steps in STEPS]
    for shape in [*shapes, None]:
        tokens = passes = forwards = rows = same = 0
        for prompt, text in zip(prompts, expected, strict=True):
            plan = Counted(FixedPlan(*shape) if shape else AdaptivePlan(model.config.canvas_length, 16))
            with patch.object(speculative, "AdaptivePlan", lambda longest, most, plan=plan: plan):
                result = generate(model, processor, prompt, options=options)
            tokens += len(result.tokens)
            passes += result.stats.passes
            forwards += result.stats.forwards
            rows += sum(length * (steps + 1) for length, steps in plan.shapes)
            same += result.tokens == text
        name = f"{shape[0]:3} tokens, {shape[1]} steps" if shape else "the plan that adapts"
        agreed = f", {same}/{len(prompts)} texts the same" if arguments.temperature == 0 else ""
        print(
            f"{name}: {tokens / passes:.2f} tokens a causal pass, {tokens / forwards:.2f} a pass of any kind, "
            f"{rows / tokens:.1f} rows a token{agreed}",
            flush=True,
        )
        if arguments.temperature == 0 and same < len(prompts):
            raise SystemExit("A text differs from the autoregressive decoder's.")


if __name__ == "__main__":
    main()
