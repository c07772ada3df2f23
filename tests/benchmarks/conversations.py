"""Do thinking, tools, several turns and images score as they do in Transformers? On the trained demo checkpoint.

    python tests/benchmarks/conversations.py [--seeds 3]

Every question of those tasks is answered in float32 and compared with tests/data/tiny/reference.json, what
Transformers' own `generate` scored on the same questions. The exit status is 1 where the tasks together are more than
two points worse.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from behaviour import DEMO, MAX_TOKENS, QUESTIONS, Question, is_right

from mlx_diffusiongemma import Processor, Prompt, generate, load
from mlx_diffusiongemma.convert import convert_checkpoint

TASKS = ("think", "tool call", "tool result", "multi", "image")
POINTS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    reference = json.loads((QUESTIONS.parent / "reference.json").read_text(encoding="utf-8"))["by_task"]
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    questions = [question for question in map(json.loads, lines) if question["task"] in TASKS]
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(DEMO, Path(scratch) / "float32", bits=None, dtype="float32")
        model, processor = load(Path(scratch) / "float32")
        right = np.array([answer(model, processor, question, seeds) for question in questions])
    kinds = np.array([question["task"] for question in questions])
    for task in TASKS:
        ours, theirs = 100 * right[kinds == task].mean(), 100 * reference[task]["accuracy"]
        print(f"{task:12} {ours:5.1f} %, reference {theirs:5.1f} %")
    expected = np.mean([reference[task]["accuracy"] for task in kinds])
    ours = right.mean()
    print(f"{len(questions)} questions x {seeds} seeds: {100 * ours:.1f} %, reference {100 * expected:.1f} %")
    return 0 if 100 * (expected - ours) <= POINTS else 1


def answer(model: Any, processor: Processor, question: Question, seeds: int) -> list[bool]:
    """Whether the reply is right, seed by seed."""
    prompt = prompt_of(processor, question)
    replies = (generate(model, processor, prompt, max_tokens=MAX_TOKENS, seed=seed) for seed in range(seeds))
    return [is_right(question, processor.parse(reply.tokens, prompt)) for reply in replies]


def prompt_of(processor: Processor, question: Question) -> Prompt:
    images = [QUESTIONS.parent / question["image"]] if question["image"] else []
    return processor.prompt(
        question["messages"], images=images, tools=question["tools"] or (), thinking=question["thinking"]
    )


if __name__ == "__main__":
    sys.exit(main())
