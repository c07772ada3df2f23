"""Train the demo checkpoint further, all of its weights, so that it also decodes left to right.

    python tasks.py DATA --without ../../tests/data/tiny/prompts.jsonl
    python retrain.py DATA WORK [--iters 1000] [--resume]
    python retrain.py DATA WORK --write ../../mlx_diffusiongemma/demo

The first writes conversations, the second trains (`WORK/run` holds its progress), the third puts the weights into a
checkpoint of the published layout, in bfloat16. On Linux, MLX's wheel multiplies matrices with the reference BLAS: with
OpenBLAS in its place (`LD_PRELOAD=libopenblas.so.0`), training is four times as fast.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx

import mlx_diffusiongemma
from mlx_diffusiongemma import load
from mlx_diffusiongemma.checkpoints.adapter_files import load_adapter
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.model.adapters import AdapterConfig
from mlx_diffusiongemma.training import TrainingOptions, train
from mlx_diffusiongemma.training.data import read_folder
from mlx_diffusiongemma.training.trainer import Report

DEMO = Path(mlx_diffusiongemma.__file__).parent / "demo"
MOST_TOKENS = 512  # of a conversation


def retrain(data: Path, work: Path, iters: int, resume: bool) -> None:
    """Train all weights in float32, from those of the demo checkpoint."""
    start = work / "start"
    if not start.exists():
        convert_checkpoint(DEMO, start, bits=None, dtype="float32")
    model, processor = load(start)
    records = read_folder(data, processor, MOST_TOKENS, required=("train", "valid"))
    options = TrainingOptions(
        adapter=AdapterConfig("full"),
        iters=iters,
        batch_size=8,
        grad_accumulation_steps=2,
        warmup=50,
        learning_rate=8e-4,
        max_seq_length=MOST_TOKENS,
        generate=60,
    )

    def show(report: Report) -> None:
        print(report, file=sys.stderr, flush=True)

    run = work / "run"
    train(
        model, processor, records["train"], options, adapter_path=run, valid=records["valid"], resume=resume,
        on_report=show,
    )  # fmt: skip


def write(adapter: Path, checkpoint: Path) -> None:
    """Replace the weights of a checkpoint in the published layout that were trained."""
    file = checkpoint / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    for name, array in load_adapter(adapter).arrays.items():
        published = name if name in tensors else name.removesuffix(".weight")  # experts are saved without it
        tensors[published] = array.astype(tensors[published].dtype).reshape(tensors[published].shape)
    mx.save_safetensors(str(file), tensors, {"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--iters", type=int, default=1000)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--write", type=Path, metavar="CHECKPOINT")
    given = parser.parse_args()
    if given.write:
        write(given.work / "run", given.write)
    else:
        retrain(given.data, given.work, given.iters, given.resume)
