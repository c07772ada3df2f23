"""Fine-tuning measured: what a new task costs the old ones, and an example beside mlx-lm's.

    python tests/benchmarks/training.py lift [--iters 1200]    a task that the demo checkpoint cannot do, by LoRA
    python tests/benchmarks/training.py cost [--pairs 5]       seconds and peak memory of an example, four ways
    python tests/benchmarks/training.py kills [--kills 10]     killed again and again and resumed: the same bytes?
    python tests/benchmarks/training.py nothing [--iters 600]  from random weights, the shortest task

`lift` trains a LoRA of rank 8 on the packaged checkpoint with 5 % of its own tasks mixed in, and measures both before
and after. `cost` compares a gradient of our loss with one of `mlx_lm.lora`'s on gemma4_text of the same shapes, and
with plain autograd of our own loss, which holds the logits. On Linux, MLX's wheel has the reference BLAS; with OpenBLAS
(`LD_PRELOAD=libopenblas.so.0`) all of it is about four times as fast.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from random_models import config_json, in_mlx_lm, random_model, true_pattern  # noqa: E402

from mlx_diffusiongemma import load  # noqa: E402
from mlx_diffusiongemma.convert import convert_checkpoint  # noqa: E402
from mlx_diffusiongemma.model.adapters import AdapterConfig, keys_of  # noqa: E402
from mlx_diffusiongemma.training import TrainingOptions, diffusion_loss, forward, loss  # noqa: E402  # noqa: E402
from mlx_diffusiongemma.training.data import Example, read_records  # noqa: E402
from mlx_diffusiongemma.training.draws import Batch, draw  # noqa: E402
from mlx_diffusiongemma.training.scoring import score  # noqa: E402
from mlx_diffusiongemma.training.trainer import prepare  # noqa: E402

DEMO = ROOT / "mlx_diffusiongemma" / "demo"
QUESTIONS = ROOT / "tests" / "data" / "tiny" / "prompts.jsonl"
TASKS = ROOT / "examples" / "demo_checkpoint" / "tasks.py"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
SHAPES = {
    "vocab_size": 65536,
    "hidden_size": 256,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 64,
    "global_head_dim": 128,
    "num_experts": 16,
    "top_k_experts": 4,
    "sliding_window": 256,
}
PREFIX, CANVAS, LAYERS = 256, 256, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    lifting = verbs.add_parser("lift")
    lifting.add_argument("--iters", type=int, default=1200)
    lifting.add_argument("--base", type=Path, default=DEMO)
    costing = verbs.add_parser("cost")
    costing.add_argument("--pairs", type=int, default=5)
    killing = verbs.add_parser("kills")
    killing.add_argument("--kills", type=int, default=10)
    beginning = verbs.add_parser("nothing")
    beginning.add_argument("--iters", type=int, default=600)
    given = parser.parse_args()
    if given.verb == "cost":
        return cost(given.pairs)
    with tempfile.TemporaryDirectory() as scratch:
        if given.verb == "lift":
            lift(Path(scratch), given.base, given.iters)
        elif given.verb == "kills":
            kills(Path(scratch), given.kills)
        else:
            from_nothing(Path(scratch), given.iters)


def lift(scratch: Path, checkpoint: Path, iters: int) -> None:
    """Teach a checkpoint to double letters, with the command that a user would give."""
    base, data, old = scratch / "base", scratch / "data", scratch / "old"
    convert_checkpoint(checkpoint, base, bits=None, dtype="float32")
    subprocess.run([sys.executable, TASKS, old, "--train", "1500", "--valid", "20", "--without", QUESTIONS], check=True)
    drawn = random.Random(5)
    words = list(dict.fromkeys("".join(drawn.choices(LETTERS, k=drawn.randint(3, 10))) for _ in range(20300)))
    for name, part in (("test", words[:100]), ("valid", words[100:130]), ("train", words[130:])):
        lines = [{"prompt": f"double {word}", "completion": "".join(2 * letter for letter in word)} for word in part]
        write_lines(data / f"{name}.jsonl", lines)
    measure("before", base, data, scratch, None)
    command = f"mlx-dg train --model {base} --data {data} --mix {old} --mix-share 0.05 --iters {iters} --batch-size 8"
    command += " --grad-accumulation-steps 2 --learning-rate 1e-3 --mask-prompt --steps-per-eval 200"
    command += f" --generate 30 --adapter-path {scratch / 'adapters'}"
    print(command)
    began = time.monotonic()
    subprocess.run([Path(sys.executable).parent / "mlx-dg", *command.split()[1:]], check=True)
    print(f"trained in {(time.monotonic() - began) / 60:.1f} minutes")
    measure("after", base, data, scratch, scratch / "adapters")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained(*arguments: object) -> list[str]:
    """The command `mlx-dg train` of this environment, with these arguments."""
    return [str(Path(sys.executable).parent / "mlx-dg"), "train", *map(str, arguments)]


def kills(scratch: Path, count: int) -> None:
    """Kill a run at random moments, resume it each time, and compare its adapter with an undisturbed run's."""
    base, data, draw_moment = scratch / "base", scratch / "data", random.Random(11)
    convert_checkpoint(DEMO, base, bits=None, dtype="float32")
    write_lines(data / "train.jsonl", [{"prompt": f"say {n}", "completion": str(n) * 2} for n in range(40)])
    settings = ["--model", base, "--data", data, "--iters", 24, "--batch-size", 2, "--grad-accumulation-steps", 2]
    settings += ["--save-every", 1, "--num-layers", 2, "--adapter-path"]
    began = time.monotonic()
    subprocess.run(trained(*settings, scratch / "whole"), check=True, capture_output=True)
    length = time.monotonic() - began
    killed, runs = 0, 0
    while killed < count or runs == 0:
        is_begun = (scratch / "cut" / "training.safetensors").exists()
        command = trained(*settings, scratch / "cut", *["--resume"] * is_begun)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs += 1
        try:
            process.wait(timeout=draw_moment.uniform(0, 0.4 * length))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    subprocess.run(trained(*settings, scratch / "cut", "--resume"), check=True, capture_output=True)
    whole, cut = ((scratch / name / "adapters.safetensors").read_bytes() for name in ("whole", "cut"))
    print(f"killed {killed} times: the adapter is {'the same' if whole == cut else 'ANOTHER ONE'}, byte for byte")
    if whole != cut:
        raise SystemExit(1)


def from_nothing(scratch: Path, iters: int) -> None:
    """Train a model of the demo checkpoint's shape from random weights on one short task."""
    base, data, draw_word = scratch / "base", scratch / "data", random.Random(5)
    convert_checkpoint(DEMO, base, bits=None, dtype="float32")
    file = base / "model.safetensors"
    weights = {name: redrawn(name, array) for name, array in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    words = ["".join(draw_word.choices("abcd", k=3)) for _ in range(2000)]
    lines = [{"prompt": word, "completion": word[::-1]} for word in words]
    write_lines(data / "train.jsonl", lines[:1900])
    write_lines(data / "valid.jsonl", lines[1900:])
    settings = ["--model", base, "--data", data, "--iters", iters, "--batch-size", 16, "--grad-accumulation-steps", 1]
    settings += ["--fine-tune-type", "full", "--learning-rate", 1e-3, "--steps-per-eval", 100, "--generate", 50]
    subprocess.run(trained(*settings, "--adapter-path", scratch / "run"), check=True)


def redrawn(name: str, array: mx.array) -> mx.array:
    """Fresh weights of the same shape: what training begins with where nothing is known."""
    if array.ndim == 1 or "vision" in name:
        return mx.ones_like(array) if name.endswith(("norm.weight", "layer_scalar")) else array
    size = 0.02 if "embed" in name else array.shape[-1] ** -0.5
    return size * mx.random.normal(array.shape, key=mx.random.key(sum(map(ord, name))))


def measure(name: str, base: Path, data: Path, scratch: Path, adapter: Path | None) -> None:
    """Print the share of right replies and the steps per canvas: of the new task, and of the checkpoint's own."""
    model, processor = load(base, adapter=adapter)
    new = score(model, processor, read_records(data / "test.jsonl", processor, 512))
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    own = scratch / "own.jsonl"
    own.write_text("".join(json.dumps(as_line(question)) + "\n" for question in questions if not question["image"]))
    kept = score(model, processor, read_records(own, processor, 512))
    print(
        f"{name}: new task {new.right:.1%} of {new.count}, {new.steps:.2f} steps a canvas; its own tasks "
        f"{kept.right:.1%} of {kept.count}, {kept.steps:.2f} steps"
    )


def as_line(question: dict[str, Any]) -> dict[str, Any]:
    """One of the checkpoint's own questions as a line of training data."""
    answer: dict[str, Any] = {"role": "assistant", "content": question["text"]}
    if question.get("tool_calls"):
        calls = [{"type": "function", "function": call} for call in question["tool_calls"]]
        answer["tool_calls"] = [{**call, "id": str(number)} for number, call in enumerate(calls, 1)]
    if question.get("thought"):
        answer["reasoning"] = question["thought"]
    return {
        "messages": [*question["messages"], answer],
        "tools": question["tools"] or [],
        "thinking": question["thinking"],
    }


def cost(pairs: int) -> None:
    """Time gradients side by side, each once per pair, and print medians and peaks."""
    config = config_json(true_pattern(LAYERS), CANVAS, **SHAPES)
    model = random_model(config, None)
    peer = in_mlx_lm(model, config, None)
    prepare(model, TrainingOptions(adapter=AdapterConfig(keys=keys_of(KEYS))))
    random_ids = np.random.default_rng(0)
    ids = random_ids.integers(SHAPES["vocab_size"], size=PREFIX + CANVAS).tolist()
    drawn = draw(Example(tuple(ids[:PREFIX]), tuple(ids[PREFIX:])), CANVAS, SHAPES["vocab_size"], random_ids)
    batch = Batch.of([drawn])
    ways = {
        "ours": gradient_of(model, lambda: sum(diffusion_loss(model, batch))),
        "ours, --grad-checkpoint": gradient_of(model, lambda: sum(diffusion_loss(model, batch, checkpoint=True))),
        "plain autograd of our loss": gradient_of(model, lambda: plain_loss(model, batch)),
        "mlx_lm.lora on gemma4_text": mlx_lm_gradient(peer, ids),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    for name, way in ways.items():
        way()
        gc.collect()
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        way()
        peaks[name] = mx.get_peak_memory() - held
    for _ in range(pairs):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    print(
        f"{LAYERS} layers, hidden 256, vocabulary {SHAPES['vocab_size']:,}, {PREFIX} + {CANVAS} tokens, canvas {CANVAS}"
    )
    for name in ways:
        print(f"{name:28} {statistics.median(seconds[name]):6.2f} s {peaks[name] / 1e6:8.1f} MB")


def gradient_of(model: nn.Module, value: Callable[[], mx.array]) -> Callable[[], None]:
    """A function that computes one gradient with respect to what is trained."""
    compute = nn.value_and_grad(model, value)
    return lambda: mx.eval(compute())


def plain_loss(model: Any, batch: Batch) -> mx.array:
    """The same loss from all logits at once."""
    hidden, kept = forward.encode(model, batch, False)
    causal = nn.losses.cross_entropy(model.logits(hidden[:, :-1]), batch.tokens[:, 1:])
    denoised = forward.denoise(model, batch, kept, loss._conditioning(model, batch, kept), False)
    canvas = nn.losses.cross_entropy(model.logits(denoised), batch.targets)
    return (canvas * batch.weights).sum() + (causal * batch.next_weights).sum()


def mlx_lm_gradient(peer: nn.Module, ids: list[int]) -> Callable[[], None]:
    """The gradient that `mlx_lm.lora` takes on as many tokens."""
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    peer.freeze()
    linear_to_lora_layers(peer, LAYERS, {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": KEYS})
    compute = nn.value_and_grad(peer, default_loss)
    tokens, lengths = mx.array([ids]), mx.array([[0, len(ids)]])
    return lambda: mx.eval(compute(peer, tokens, lengths))


if __name__ == "__main__":
    main()
