"""Checkpoints for the conversion tests: the demo's, taken apart and put together with something wrong."""

import json
import math
import shutil
from pathlib import Path

DEMO = Path(__file__).parent.parent / "mlx_diffusiongemma" / "demo"
TRUE_SHAPES = Path(__file__).parent / "data" / "true_shapes.json"


def read_tensors(path):
    """{name: (dtype, shape, bytes)} of a safetensors file, from the format's description."""
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            info["dtype"],
            tuple(info["shape"]),
            raw[start + info["data_offsets"][0] : start + info["data_offsets"][1]],
        )
        for name, info in header.items()
    }


def write_tensors(path, tensors):
    """The inverse of `read_tensors`."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def copy_demo(target, change=None, **config):
    """The demo checkpoint in a new directory, its tensors passed through `change` and its config.json updated."""
    shutil.copytree(DEMO, target)
    if change:
        tensors = read_tensors(DEMO / "model.safetensors")
        write_tensors(target / "model.safetensors", change(tensors) or tensors)
    if config:
        edit_json(target / "config.json", lambda content: content.update(config))
    return target


def split(directory, count=3):
    """Replace model.safetensors by `count` shards and an index."""
    tensors = list(read_tensors(directory / "model.safetensors").items())
    (directory / "model.safetensors").unlink()
    size, files = math.ceil(len(tensors) / count), {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(tensors[i * size : (i + 1) * size])
        write_tensors(directory / name, part)
        files |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def edit_json(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def all_tensors(directory):
    """{name: (dtype, shape, bytes)} over every shard of a directory."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in read_tensors(path).items()
    }


def true_shapes(layout):
    """(name, shape, dtype) of every tensor of the 26B checkpoint: `published` or `mlx_4bit`."""
    content = json.loads(TRUE_SHAPES.read_text())
    kinds = content["config"]["text_config"]["layer_types"]
    compact = content[layout]
    named = dict(compact["once"])
    for i, kind in enumerate(kinds):
        named |= {f"model.decoder.layers.{i}.{name}": value for name, value in compact[kind].items()}
        named |= {f"model.encoder.language_model.layers.{i}.{n}": value for n, value in compact["encoder"].items()}
    for i in range(content["config"]["vision_config"]["num_hidden_layers"]):
        named |= {f"model.encoder.vision_tower.encoder.layers.{i}.{n}": v for n, v in compact["vision"].items()}
    split_values = {name: value.split() for name, value in named.items()}
    return [(name, tuple(map(int, shape.split("x"))), dtype) for name, (dtype, shape) in split_values.items()]


def true_config():
    """The configuration of the 26B checkpoint, as far as it matters."""
    return json.loads(TRUE_SHAPES.read_text())["config"]
