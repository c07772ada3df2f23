"""Does the whole thing answer as Transformers' own `generate` does? Accuracy and steps on the trained demo checkpoint.

    python tests/benchmarks/behaviour.py [--prompts 200] [--seeds 5]

Runs seeded prompts through Transformers (where PyTorch is installed), through our float32 and through our 4-bit
conversion, and prints accuracy and denoising steps per canvas by task. The exit status is 1 where a bar does not hold.
A prompt's seeds are not independent of each other, so standard errors are taken over prompts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffusiongemma import GenerationOptions, Processor, Prompt, generate, load
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.events import Reply

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mlx_diffusiongemma" / "demo"
QUESTIONS = ROOT / "tests" / "data" / "tiny" / "prompts.jsonl"
MAX_TOKENS = 192  # three canvases
OURS, FOUR_BIT, REFERENCE = "float32", "4-bit", "Transformers"

Question = dict[str, Any]
# A prompt, in a form that the system takes, and a seed -> the reply's tokens before its end, the steps of each canvas.
Generate = Callable[[Any, int], tuple[list[int], list[int]]]


@dataclass
class Scores:
    """Of one system: means over seeds, per question."""

    right: np.ndarray
    steps: np.ndarray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    questions = choose_questions(arguments.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        systems, processor = load_systems(Path(scratch))
        prompts = [
            processor.prompt(question["messages"], tools=question["tools"] or (), thinking=question["thinking"])
            for question in questions
        ]
        scores = {
            name: timed(name, measure, answer, questions, prompts, processor, arguments.seeds)
            for name, answer in systems.items()
        }
    print_table([question["task"] for question in questions], scores, arguments.seeds)
    return 0 if all(check_bars(scores)) else 1


def choose_questions(count: int) -> list[Question]:
    """Some of the questions without images, always the same."""
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return random.Random(0).sample([question for question in questions if not question["image"]], count)


def load_systems(scratch: Path) -> tuple[dict[str, Generate], Processor]:
    # Four-bit codes with float32 scales: CPUs are slow at bfloat16.
    convert_checkpoint(DEMO, scratch / "float32", bits=None, dtype="float32")
    convert_checkpoint(DEMO, scratch / "4bit", bits=4, dtype="float32")
    systems, processor = {}, None
    for name, directory in ((OURS, "float32"), (FOUR_BIT, "4bit")):
        model, processor = load(scratch / directory)
        systems[name] = ours(model, processor)
    if importlib.util.find_spec("torch") is not None:
        systems[REFERENCE] = transformers_generate(model.options)
    return systems, processor


def ours(model: Any, processor: Processor) -> Generate:
    def answer(prompt: Prompt, seed: int) -> tuple[list[int], list[int]]:
        result = generate(model, processor, prompt, max_tokens=MAX_TOKENS, seed=seed)
        return result.tokens, result.stats.steps

    return answer


def transformers_generate(options: GenerationOptions) -> Generate:
    """The same weights, widened to float32, in the reference. It takes a prompt of text, or what Transformers' own
    processor makes of one (a dict of tensors).
    """
    import torch
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    class Counting(DiffusionGemmaForBlockDiffusion):
        """Reports the forward passes themselves where `generate` divides by them."""

        @staticmethod
        def _compute_tokens_per_forward(input_ids, decoder_forward_passes, initial_input_ids_len, pad_token_id):
            return decoder_forward_passes

    torch.set_num_threads(1)  # a model this small only waits for other threads
    model = Counting.from_pretrained(DEMO, dtype=torch.float32).eval()
    ends = list(options.end_tokens)

    def answer(prompt: Prompt | dict[str, Any], seed: int) -> tuple[list[int], list[int]]:
        inputs = {"input_ids": torch.tensor([prompt.tokens])} if isinstance(prompt, Prompt) else prompt
        torch.manual_seed(seed)
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, eos_token_id=ends)
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        canvases = len(tokens) // model.config.canvas_length
        first_end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        passes = int(output.tokens_per_forward[0])
        return tokens[:first_end], [passes / canvases] * canvases

    return answer


def measure(
    answer: Generate, questions: list[Question], prompts: list[Any], processor: Processor, seeds: int
) -> Scores:
    right, steps = np.zeros((len(questions), seeds)), np.zeros((len(questions), seeds))
    for i, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        for seed in range(seeds):
            tokens, of_canvases = answer(prompt, seed * len(questions) + i)
            right[i, seed] = is_right(question, processor.parse(tokens))
            steps[i, seed] = np.mean(of_canvases)
    return Scores(right.mean(axis=1), steps.mean(axis=1))


def timed(name: str, work: Callable[..., Scores], *arguments: Any) -> Scores:
    """What `work` returns; how long it took goes to stderr."""
    started = time.perf_counter()
    scores = work(*arguments)
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return scores


def is_right(question: Question, reply: Reply) -> bool:
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    if calls != question.get("tool_calls", []) or reply.thinking.strip() != question.get("thought", ""):
        return False
    asked = question["messages"][-1]["content"]
    if isinstance(asked, str) and asked.startswith("solve "):
        return solves(asked.removeprefix("solve "), reply.text)
    return reply.text == question["text"]


def solves(puzzle: str, answer: str) -> bool:
    """Whether the answer completes the 4x4 sudoku: any completion counts."""
    if not re.fullmatch(puzzle, answer):  # a dot stands for any digit
        return False
    grid = answer.split("/")
    columns = ["".join(column) for column in zip(*grid, strict=True)]
    boxes = [grid[y][x : x + 2] + grid[y + 1][x : x + 2] for y in (0, 2) for x in (0, 2)]
    return all(sorted(group) == list("1234") for group in grid + columns + boxes)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean over prompts and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return values.mean(), error


def print_table(tasks: list[str], scores: dict[str, Scores], seeds: int) -> None:
    print(f"{len(tasks)} prompts x {seeds} seeds; accuracy in %, denoising steps per canvas, standard errors")
    print(f"{'task':12} {'n':>4}" + "".join(f" | {name:^27}" for name in scores))
    for task in [*sorted(set(tasks)), "all"]:
        chosen = np.array([task in (own, "all") for own in tasks])
        row = f"{task:12} {chosen.sum():4}"
        for score in scores.values():
            accuracy, accuracy_error = mean_and_error(100 * score.right[chosen])
            steps, steps_error = mean_and_error(score.steps[chosen])
            row += f" | {accuracy:5.1f} ± {accuracy_error:4.1f}  {steps:5.2f} ± {steps_error:4.2f}"
        print(row)


def check_bars(scores: dict[str, Scores]) -> list[bool]:
    """Compare with the reference, prompt by prompt, and say which bars hold."""
    against = REFERENCE if REFERENCE in scores else OURS
    if against == OURS:
        print("PyTorch is not installed: the 4-bit conversion is compared with float32, float32 with nothing.")
    held = []
    for name, points in ((OURS, 2.0), (FOUR_BIT, 5.0)):
        if name == against:
            continue
        ours, theirs = scores[name], scores[against]
        difference, error = mean_and_error(100 * (ours.right - theirs.right))
        held.append(abs(difference) <= points)
        print(
            f"{name} - {against}: accuracy {difference:+.2f} ± {error:.2f} points; at most {points:g}: {verdict(held)}"
        )
        if name == OURS:
            difference, error = mean_and_error(ours.steps - theirs.steps)
            share = difference / theirs.steps.mean()
            held.append(abs(share) <= 0.05 or abs(difference) <= 2 * error)
            print(
                f"{name} - {against}: steps per canvas {difference:+.3f} ± {error:.3f}, {share:+.1%}; "
                f"at most 5 % or two standard errors: {verdict(held)}"
            )
    return held


def verdict(held: list[bool]) -> str:
    return "holds" if held[-1] else "DOES NOT HOLD"


if __name__ == "__main__":
    sys.exit(main())
