"""Do thinking, tools, several turns and images score as they do in Transformers? On the trained demo checkpoint.

    python tests/benchmarks/conversations.py [--seeds 20] [--tasks think image]

Every question of those tasks is answered in float32, here and by Transformers' own `generate`, which reads it through
Transformers' own tokenizer and image processor; both replies are parsed by the same parser, and every parsed field has
to be exact. Each task is judged by itself: it holds where the two accuracies are at most two points apart, either way.
Differences are taken prompt by prompt; a prompt's seeds are not independent of each other, so standard errors are over
prompts. One seed cannot tell: it leaves over three points of error on thinking and on images. Without PyTorch, the
reference is tests/data/tiny/reference.json: one seed, so within two standard errors is near enough too. The exit status
is 1 where a task does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from behaviour import (
    DEMO,
    QUESTIONS,
    REFERENCE,
    Question,
    Scores,
    mean_and_error,
    measure,
    ours,
    timed,
    transformers_generate,
    verdict,
)

from mlx_diffusiongemma import Processor, Prompt, load
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.processing.processor import IMAGE_BEGIN, IMAGE_END, IMAGE_TOKEN

if TYPE_CHECKING:
    import torch

TASKS = ("think", "tool call", "tool result", "multi", "image")
POINTS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=", ".join(TASKS))
    arguments = parser.parse_args()
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    questions = [question for question in map(json.loads, lines) if question["task"] in arguments.tasks]
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(DEMO, Path(scratch) / "float32", bits=None, dtype="float32")
        model, processor = load(Path(scratch) / "float32")
        prompts = [prompt_of(processor, question) for question in questions]
        mine = timed("ours", measure, ours(model, processor), questions, prompts, processor, arguments.seeds)
    live = importlib.util.find_spec("torch") is not None
    if live:
        generate, inputs = transformers_generate(model.options), reference_inputs(questions, prompts)
        theirs = timed(REFERENCE, measure, generate, questions, inputs, processor, arguments.seeds)
    else:
        theirs = stored_scores(questions)
    return 0 if all(compare([question["task"] for question in questions], mine, theirs, arguments.seeds, live)) else 1


def prompt_of(processor: Processor, question: Question) -> Prompt:
    images = [QUESTIONS.parent / question["image"]] if question["image"] else []
    return processor.prompt(
        question["messages"], images=images, tools=question["tools"] or (), thinking=question["thinking"]
    )


def reference_inputs(questions: list[Question], prompts: list[Prompt]) -> list[dict[str, torch.Tensor]]:
    """The questions as Transformers prepares them, which must be the tokens of `prompts`.

    The steps are `Gemma4Processor`'s; the class itself wants torchvision and an audio model beside.
    """
    import torch
    from PIL import Image
    from transformers import AutoTokenizer
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    tokenizer, image_processor = AutoTokenizer.from_pretrained(DEMO), Gemma4ImageProcessorPil.from_pretrained(DEMO)

    def prepare(question: Question) -> dict[str, torch.Tensor]:
        text = tokenizer.apply_chat_template(
            question["messages"],
            tools=question["tools"],
            add_generation_prompt=True,
            enable_thinking=question["thinking"],
            tokenize=False,
        )
        picture = {}
        if question["image"]:
            picture = dict(image_processor(Image.open(QUESTIONS.parent / question["image"]), return_tensors="pt"))
            (room,) = picture.pop("num_soft_tokens_per_image")
            text = text.replace(IMAGE_TOKEN, f"{IMAGE_BEGIN}{IMAGE_TOKEN * int(room)}{IMAGE_END}")
        tokens = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        if picture:
            picture["mm_token_type_ids"] = (tokens == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int()
        return {"input_ids": tokens, **picture}

    prepared = [prepare(question) for question in questions]
    for question, prompt, inputs in zip(questions, prompts, prepared, strict=True):
        if inputs["input_ids"][0].tolist() != prompt.tokens:
            sys.exit(f"Transformers reads question {question['id']} as other tokens; there is nothing to compare.")
    return prepared


def stored_scores(questions: list[Question]) -> Scores:
    """What is known of the reference's scores without it: the mean of each task, in place of each question's own."""
    by_task = json.loads((QUESTIONS.parent / "reference.json").read_text(encoding="utf-8"))["by_task"]
    tasks = [by_task[question["task"]] for question in questions]
    return Scores(*(np.array([task[name] for task in tasks]) for name in ("accuracy", "steps_per_canvas")))


def compare(tasks: list[str], mine: Scores, theirs: Scores, seeds: int, live: bool) -> list[bool]:
    """Print a line per task; which of them hold."""
    reference = "`generate`, live, with as many seeds" if live else "stored figures of one seed (PyTorch is missing)"
    print(f"{len(tasks)} prompts x {seeds} seeds in float32; theirs: Transformers' {reference}; standard errors")
    columns = f"{'ours':>7} {'theirs':>7} {'difference':>15}"
    print(f"{'':28} | {'accuracy, %':^31} | {'denoising steps per canvas':^31} |")
    print(f"{'task':12} {'prompts x seeds':>15} | {columns} | {columns} |")
    held = []
    for task in sorted(set(tasks), key=TASKS.index):
        chosen = np.array(tasks) == task
        accuracy = [100 * scores.right[chosen] for scores in (mine, theirs)]
        steps = [scores.steps[chosen] for scores in (mine, theirs)]
        difference, error = mean_and_error(accuracy[0] - accuracy[1])
        bar = POINTS if live else max(POINTS, 2 * np.hypot(error, one_seed_error(accuracy[1])))
        held.append(abs(difference) <= bar)
        count = f"{chosen.sum()} x {seeds}"
        print(f"{task:12} {count:>15} | {pair(*accuracy)} | {pair(*steps)} | at most {bar:.2g} points: {verdict(held)}")
    return held


def one_seed_error(accuracy: np.ndarray) -> float:
    """The standard error of a mean, in %, of replies that are right or wrong."""
    mean = accuracy.mean()
    return (mean * (100 - mean) / len(accuracy)) ** 0.5


def pair(mine: np.ndarray, theirs: np.ndarray) -> str:
    difference, error = mean_and_error(mine - theirs)
    return f"{mine.mean():7.2f} {theirs.mean():7.2f} {difference:+7.2f} ± {error:5.2f}"


if __name__ == "__main__":
    sys.exit(main())
