"""Write a checkpoint with DiffusionGemma 26B's tensor shapes and few layers, for measuring conversions.

    python tests/benchmarks/synthetic_checkpoint.py /tmp/synthetic --layers 4 [--format bf16|fp8|nvfp4]

Four layers are 9.2 GB in bf16. fp8 and nvfp4 have one key per expert, as the published ones do. The values are the same
block of random ones again and again: sizes and speeds do not care. Needs little memory itself.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from convert_data import DEMO, true_config

from mlx_diffusiongemma.checkpoints.safetensors import INDEX_NAME, ITEM_BYTES, write_header
from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.convert.reading.names import expected_tensors

SHARD_BYTES = 5_000_000_000
BLOCK = 1 << 24  # values
Shape = tuple[int, ...]
Tensor = tuple[str, str, Shape]  # name, dtype, shape


def write_synthetic(directory: Path, layers: int, encoding: str) -> None:
    """Write the checkpoint into the new `directory`; its tokenizer and template are the demo's."""
    directory.mkdir(parents=True)
    config = true_config()
    config["text_config"]["num_hidden_layers"] = layers
    config["text_config"]["layer_types"] = config["text_config"]["layer_types"][-layers:]
    (directory / "config.json").write_text(json.dumps(config))
    for path in DEMO.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copyfile(path, directory / path.name)
    shards = _shards(list(stored_tensors(expected_tensors(ModelConfig.from_dict(config)), encoding)))
    blocks = random_blocks()
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _, _ in shard}
        _write(directory / name, shard, blocks)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stored_tensors(tensors: dict[str, Shape], encoding: str) -> Iterator[Tensor]:
    """(name, dtype, shape) of everything a checkpoint in this encoding stores."""
    for name, shape in tensors.items():
        if encoding == "bf16" or not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            yield name, "BF16", shape
            continue
        home, _, stack = name.rpartition(".")
        halves = ("gate", "up") if stack == "gate_up_proj" else ("down",)
        rows, columns = shape[1] // len(halves), shape[2]
        for linear in (f"{home}.{expert}.{half}_proj" for expert in range(shape[0]) for half in halves):
            if encoding == "fp8":
                yield f"{linear}.weight", "F8_E4M3", (rows, columns)
                yield f"{linear}.weight_scale", "BF16", (rows, 1)
            else:
                yield f"{linear}.weight", "U8", (rows, columns // 2)
                yield f"{linear}.weight_scale", "F8_E4M3", (rows, columns // 16)
                yield f"{linear}.weight_scale_2", "F32", ()


def random_blocks() -> dict[str, memoryview]:
    """Bytes of plausible values per dtype: weights around 0.02, fp8 and fp4 codes of any kind but NaN."""
    random = np.random.default_rng(0)
    normal = random.standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    codes = random.integers(0, 256, BLOCK, np.uint8)
    arrays = {
        "BF16": (normal.view(np.uint32) >> 16).astype(np.uint16),
        "F32": np.full(1, 0.01, np.float32),
        "F8_E4M3": codes & 0x6F,
        "U8": codes,
    }
    return {dtype: memoryview(array).cast("B") for dtype, array in arrays.items()}


def _shards(tensors: list[Tensor]) -> list[list[Tensor]]:
    shards, size = [[]], 0
    for name, dtype, shape in tensors:
        nbytes = ITEM_BYTES[dtype] * math.prod(shape)
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype, shape))
        size += nbytes
    return shards


def _write(path: Path, tensors: list[Tensor], blocks: dict[str, memoryview]) -> None:
    with path.open("wb") as file:
        file.write(write_header(tensors))
        for _, dtype, shape in tensors:
            left = ITEM_BYTES[dtype] * math.prod(shape)
            while left:
                left -= file.write(blocks[dtype][:left])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--format", choices=("bf16", "fp8", "nvfp4"), default="bf16")
    arguments = parser.parse_args()
    write_synthetic(arguments.directory, arguments.layers, arguments.format)
