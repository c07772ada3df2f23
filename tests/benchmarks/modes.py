"""What each speed mode costs and gains on the trained demo checkpoint, as the table in README.md beside this.

python tests/benchmarks/modes.py [--prompts 200] [--seeds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from behaviour import DEMO, MAX_TOKENS, choose_questions, is_right, mean_and_error

from mlx_diffusiongemma import MODES, GenerationOptions, generate, load
from mlx_diffusiongemma.convert import convert_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    questions = choose_questions(arguments.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(DEMO, Path(scratch) / "demo", bits=None, dtype="float32")
        model, processor = load(Path(scratch) / "demo")
    prompts = [
        processor.prompt(question["messages"], tools=question["tools"] or (), thinking=question["thinking"])
        for question in questions
    ]
    print("| mode | settings | right | steps per canvas | most |")
    print("|---|---|---|---|---|")
    for name, mode in MODES.items():
        options = GenerationOptions(max_tokens=MAX_TOKENS).filled_from(mode)
        right, steps = np.zeros((2, len(questions), arguments.seeds))
        most = 0
        for i, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            for seed in range(arguments.seeds):
                result = generate(model, processor, prompt, options=options, seed=seed * len(questions) + i)
                right[i, seed] = is_right(question, processor.parse(result.tokens))
                steps[i, seed] = result.stats.steps_per_canvas
                most = max(most, *result.stats.steps)
        accuracy, error = mean_and_error(100 * right.mean(axis=1))
        of_canvas, steps_error = mean_and_error(steps.mean(axis=1))
        print(
            f"| `{name}` | {settings(mode)} | {accuracy:.1f} ± {error:.1f} % | {of_canvas:.2f} ± {steps_error:.2f} | "
            f"{most} |",
            flush=True,
        )
    return 0


def settings(mode: GenerationOptions) -> str:
    """What a mode sets, in words."""
    plain = GenerationOptions()
    own = {name: value for name, value in vars(mode).items() if value != getattr(plain, name)}
    return ", ".join(f"{name} {value}" for name, value in own.items()) or "the checkpoint's"


if __name__ == "__main__":
    sys.exit(main())
