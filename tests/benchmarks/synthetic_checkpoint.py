"""Write a checkpoint with DiffusionGemma 26B's tensor shapes and few layers, for measuring conversions.

    python tests/benchmarks/synthetic_checkpoint.py /tmp/synthetic --layers 4

Four layers are 9.2 GB in bf16. The values are normal, and the same block of them again and again: sizes and speeds
do not care. Needs little memory itself.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from convert_data import DEMO, true_config

from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.convert.headers import INDEX_NAME, write_header
from mlx_diffusiongemma.convert.names import expected_tensors

SHARD_BYTES = 5_000_000_000
BLOCK = 1 << 24  # values


def write_synthetic(directory: Path, layers: int) -> None:
    """Write the checkpoint into the new `directory`; its tokenizer and template are the demo's."""
    directory.mkdir(parents=True)
    config = true_config()
    config["text_config"]["num_hidden_layers"] = layers
    config["text_config"]["layer_types"] = config["text_config"]["layer_types"][-layers:]
    (directory / "config.json").write_text(json.dumps(config))
    for path in DEMO.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copyfile(path, directory / path.name)
    normal = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    block = memoryview((normal.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    shards = _shards(expected_tensors(ModelConfig.from_dict(config)))
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        _write(directory / name, shard, block)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(tensors: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    shards, size = [{}], 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        if size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def _write(path: Path, tensors: dict[str, tuple[int, ...]], block: memoryview) -> None:
    with path.open("wb") as file:
        file.write(write_header((name, "BF16", shape) for name, shape in tensors.items()))
        for shape in tensors.values():
            left = 2 * math.prod(shape)
            while left:
                left -= file.write(block[:left])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    write_synthetic(arguments.directory, arguments.layers)
