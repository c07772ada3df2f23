"""Do replies that follow a grammar keep to it, what do they cost, and are their values right?

    python tests/benchmarks/grammars.py [--schemas 500] [--chains CHECKPOINT --prompts 100]

Random schemas on the packaged demo checkpoint, with each decoder in turn: every reply must parse and validate, and the
causal passes for a token are counted, by how many of the reply's tokens the schema fixes. Then values: questions that
the demo checkpoint answers in JSON, with a schema and in free text; and `--chains`, in text of another kind. The exit
status is 1 where a reply is not valid.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema

from mlx_diffusiongemma import GenerationOptions, Processor, Result, generate, load
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.generation.decoders.grammar import Guide
from mlx_diffusiongemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffusiongemma.options import DECODERS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from random_schemas import random_schema  # noqa: E402

DEMO = ROOT / "mlx_diffusiongemma" / "demo"
QUESTIONS = ROOT / "tests" / "data" / "tiny" / "prompts.jsonl"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,12}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
}
MAX_TOKENS = 1500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--chains", metavar="CHECKPOINT", help="one trained with both losses, with eval/prompts.jsonl")
    parser.add_argument("--prompts", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(DEMO, Path(scratch) / "demo", bits=None, dtype="float32")
        model, processor = load(Path(scratch) / "demo")
        broken = measure_validity(model, processor, arguments.schemas)
        measure_values(model, processor)
        if arguments.chains:
            convert_checkpoint(arguments.chains, Path(scratch) / "chains", bits=None, dtype="float32")
            measure_chains(*load(Path(scratch) / "chains"), Path(arguments.chains), arguments.prompts)
    return 1 if broken else 0


def measure_validity(model: DiffusionGemma, processor: Processor, count: int) -> int:
    """How many replies are not what their schemas ask for."""
    ends: Counter[str] = Counter()
    broken, tokens, passes, fixed = 0, [0, 0], [0, 0], 0
    started = time.monotonic()
    for seed in range(count):
        schema = random_schema(seed)
        options = GenerationOptions(decoder=DECODERS[seed % len(DECODERS)], seed=seed, max_tokens=MAX_TOKENS)
        result = generate(model, processor, f"json name=bob age={seed}", schema=schema, options=options)
        ends[result.finish_reason] += 1
        if result.finish_reason == "stop" and not is_valid(result, schema):
            print(f"NOT VALID: seed {seed}, {options.decoder}: {result.text!r} for {json.dumps(schema)}")
            broken += 1
        if result.finish_reason == "length" and result.data is not None:
            print(f"PRESENTED AS VALID: seed {seed}, {options.decoder}: {result.text!r}")
            broken += 1
        is_fixed = 4 * choices(processor, model, schema, result) <= len(result.tokens)
        fixed += is_fixed
        tokens[is_fixed] += len(result.tokens)
        passes[is_fixed] += result.stats.passes
    seconds = time.monotonic() - started
    print(f"{count} random schemas in {seconds:.0f} s: ended {dict(ends)}, not valid {broken}")
    for kind, number, name in ((1, fixed, "that choose at most every fourth token"), (0, count - fixed, "others")):
        print(f"  {number} {name}: {passes[kind] / max(tokens[kind], 1):.3f} causal passes a token")
    return broken


def is_valid(result: Result, schema: dict[str, Any]) -> bool:
    try:
        value = json.loads(result.text)
    except json.JSONDecodeError:
        return False
    return jsonschema.Draft202012Validator(schema).is_valid(value) and bool(value == result.data)


def choices(processor: Processor, model: DiffusionGemma, schema: dict[str, Any], result: Result) -> int:
    """At how many of a reply's tokens the schema leaves a choice."""
    grammar = processor.grammar(processor.prompt("hi"), model.options.end_tokens or (), schema=schema)
    guide, place, count = Guide(grammar.matcher()), 0, 0
    while place < len(result.tokens):
        place += len(guide.forced())
        if place < len(result.tokens):
            guide.take(result.tokens[place : place + 1])
            place, count = place + 1, count + 1
    return count


def measure_values(model: DiffusionGemma, processor: Processor) -> None:
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    questions = [question for question in questions if question["task"] == "json"]
    right = dict.fromkeys(("free text", *DECODERS), 0)
    for number, question in enumerate(questions):
        expected = json.loads(question["text"])
        free = generate(model, processor, question["messages"], seed=number)
        right["free text"] += free.text == question["text"]
        for decoder in DECODERS:
            options = GenerationOptions(decoder=decoder, temperature=0.0, seed=number)
            result = generate(model, processor, question["messages"], schema=PERSON, options=options)
            right[decoder] += result.data == expected
    print(f"Right values of {len(questions)} (denoised free text; with a schema, by decoder): {right}")


def measure_chains(model: DiffusionGemma, processor: Processor, directory: Path, count: int) -> None:
    """Words that are as many letters as asked for: what a causal pass writes freely, and under a regular expression."""
    lines = (directory / "eval" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [question for question in map(json.loads, lines) if question["prompt"].startswith("follow")][:count]
    right: Counter[str] = Counter()
    passes = {"autoregressive": 0, "speculative": 0}
    tokens = same = 0
    for question in questions:
        letters = question["prompt"].split()[-1]
        texts = []
        for decoder in ("autoregressive", "speculative"):
            options = GenerationOptions(decoder=decoder, temperature=0.0, seed=0)
            free = generate(model, processor, question["prompt"], options=options)
            result = generate(model, processor, question["prompt"], grammar=f"[a-z]{{{letters}}}", options=options)
            right[f"{decoder}, free"] += free.text == question["greedy"] and question["greedy_right"]
            right[f"{decoder}, grammar"] += result.text == question["greedy"] and question["greedy_right"]
            passes[decoder] += result.stats.passes
            texts.append(result.text)
        same += texts[0] == texts[1]
        tokens += len(texts[0])
    print(
        f"Chains, {len(questions)} prompts: right {dict(right)}; both decoders alike {same}; {tokens} tokens, {passes}"
    )


if __name__ == "__main__":
    sys.exit(main())
