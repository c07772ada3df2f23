"""What every recipe, mode and source format costs on the trained demo checkpoint: bytes, accuracy, steps per canvas.

    python tests/benchmarks/recipes.py [--prompts 100] [--seeds 1] [--only small,nvfp4]

The checkpoint is small, so that it feels few bits more than the 26B model does: compare rows with each other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from behaviour import choose_questions, measure, ours
from convert_data import DEMO, copy_demo, read_tensors
from convert_formats import fp8_tensors, nvfp4_tensors, quantize_experts

from mlx_diffusiongemma import load
from mlx_diffusiongemma.convert import RECIPES, convert_checkpoint

# Name → (source, options). Float32 beside the codes: CPUs are slow at bfloat16.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "unquantized": ("bf16", {"bits": None}),
    **{name: ("bf16", {"recipe": name}) for name in RECIPES},
    **{f"{bits}-bit": ("bf16", {"bits": bits}) for bits in (2, 5, 6, 8)},
    **{mode: ("bf16", {"mode": mode}) for mode in ("mxfp4", "mxfp8", "nvfp4")},
    "from FP8": ("fp8", {}),
    "from FP8 at 8 bits": ("fp8", {"bits": 8}),
    "from NVFP4 kept": ("nvfp4", {}),
    "from NVFP4 at 4 bits": ("nvfp4", {"bits": 4}),
}


def write_sources(directory: Path) -> dict[str, Path]:
    """The demo in every source format."""
    tensors = read_tensors(DEMO / "model.safetensors")
    sources = {"bf16": DEMO}
    for name, encode in (("fp8", fp8_tensors), ("nvfp4", nvfp4_tensors)):
        encoded, _ = quantize_experts(tensors, encode)
        sources[name] = copy_demo(directory / name, lambda _, encoded=encoded: encoded)
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", help="names of runs, separated by commas")
    arguments = parser.parse_args()
    questions = choose_questions(arguments.prompts)
    names = arguments.only.split(",") if arguments.only else list(RUNS)
    print(f"{'':<20}{'bytes':>12}{'expert error':>14}{'accuracy':>10}{'steps':>8}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        sources = write_sources(Path(scratch))
        for name in names:
            source, options = RUNS[name]
            started = time.perf_counter()
            report = convert_checkpoint(
                sources[source], Path(scratch) / f"{name} converted", dtype="float32", **options
            )
            model, processor = load(report.out)
            prompts = [
                processor.prompt(q["messages"], tools=q["tools"] or (), thinking=q["thinking"]) for q in questions
            ]
            scores = measure(ours(model, processor), questions, prompts, processor, arguments.seeds)
            error = report.group_errors.get("experts")
            print(
                f"{name:<20}{report.plan.total_bytes:>12,}{'' if error is None else f'{error:.2%}':>14}"
                f"{scores.right.mean():>10.3f}{scores.steps.mean():>8.2f}{time.perf_counter() - started:>9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
