"""An adapter becomes part of the weights: a checkpoint that needs no adapter."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx

from ..checkpoints.adapter_files import load_adapter
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.loading import load
from ..checkpoints.safetensors import INDEX_NAME
from ..config import read_json
from ..errors import AdapterError, CheckpointError
from ..model.adapters import Adapted, Adapter, dense_weight
from ..model.scaled import TENSOR_SCALE
from ..paths import user_path
from .reading.reader import MX_DTYPES, dequantize
from .writing.packaging import COPIED
from .writing.partial import Identity, open_partial, write_json
from .writing.writer import quantize

Arrays = dict[str, mx.array]

FLOATS = ("BF16", "F16", "F32")


@dataclass
class FuseReport:
    """The result of fusing. modules: linear layers that changed. lost: the part of the adapter's change that rounding
    to the checkpoint's weights took away, 0 to 1 and more: root of the squares of what is missing over the change's.
    """

    out: Path
    modules: int
    lost: float


def fuse_adapter(
    source: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FuseReport:
    """Write a checkpoint at the new directory `out` whose weights are those of `source` with the adapter merged.

    source: a converted checkpoint. dequantize: keep the merged weights unquantized, so that nothing is rounded away.
    progress: called with modules merged and their number. Raises CheckpointError, and AdapterError for an adapter that
    no single set of weights can stand for.
    """
    out = user_path(out).absolute()
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; choose another name or delete it.")
    checkpoint, trained = Checkpoint.open(source), load_adapter(adapter)
    _check(checkpoint, trained, dequantize)
    model, _ = load(checkpoint.directory, fuse=False)
    model.use_adapter(trained)
    merging = _Merging(checkpoint, dequantize)
    if trained.config.fine_tune_type == "full":
        merging.arrays = {name: array.astype(merging.dtype(name)) for name, array in trained.arrays.items()}
    else:
        layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Adapted)]
        for done, (path, layer) in enumerate(layers, start=1):
            merging.merge(path, layer)
            if progress:
                progress(done, len(layers))
    about = f"{checkpoint.directory} with {adapter}"
    with open_partial(out, Identity(hashlib.sha256(about.encode()).hexdigest(), about)) as partial:
        _write(checkpoint, merging, partial.path)
        partial.publish()
    return FuseReport(out, len(merging.modules), merging.lost)


class _Merging:
    """The arrays that stand for adapted layers, and what rounding them lost."""

    def __init__(self, checkpoint: Checkpoint, dequantize: bool):
        self.checkpoint = checkpoint
        self.dequantize = dequantize
        self.arrays: Arrays = {}
        self.modules: list[str] = []
        self._missing = self._change = 0.0

    @property
    def lost(self) -> float:
        return (self._missing / self._change) ** 0.5 if self._change else 0.0

    def dtype(self, name: str) -> mx.Dtype:
        """The dtype that a tensor has in the source."""
        return MX_DTYPES[self.checkpoint.tensors[name].dtype]

    def merge(self, path: str, layer: Adapted) -> None:
        """Merge one layer, and store it as it was stored."""
        merged, base = layer.merged(), dense_weight(layer.linear)
        quantization = self.checkpoint.config.quantization
        is_quantized = f"{path}.scales" in self.checkpoint.tensors
        codes = quantization.for_module(path) if quantization and is_quantized else None
        if codes is None or self.dequantize:
            stored = {"weight": merged.astype(self._dense_dtype(path))}
            again = stored["weight"].astype(mx.float32)
        else:
            parts = quantize(merged.astype(self._dense_dtype(path)), codes)
            stored = dict(zip(("weight", "scales", "biases"), parts, strict=False))
            again = dequantize(parts, codes, mx.float32)
        missing, change = mx.square(again - merged).sum(), mx.square(merged - base).sum()
        mx.eval(stored, missing, change)
        self._missing += float(cast(float, missing.item()))
        self._change += float(cast(float, change.item()))
        self.arrays |= {f"{path}.{name}": array for name, array in stored.items()}
        self.modules.append(path)

    def _dense_dtype(self, path: str) -> mx.Dtype:
        """The dtype of what is not quantized: affine scales have it too, other modes' scales are codes."""
        for name in (f"{path}.biases", f"{path}.weight"):
            if name in self.checkpoint.tensors and self.checkpoint.tensors[name].dtype in FLOATS:
                return self.dtype(name)
        return mx.bfloat16


def _check(checkpoint: Checkpoint, adapter: Adapter, dequantize: bool) -> None:
    """Raise AdapterError where the result would not compute what the adapter does."""
    if adapter.config.fine_tune_type != "full" and adapter.config.towers != "shared":
        raise AdapterError(
            "Encoder and decoder are one set of weights, and this adapter changes them differently; use it as it is, "
            "with --adapter, or train a shared one."
        )
    if adapter.config.fine_tune_type == "full" and checkpoint.config.quantization:
        raise AdapterError(
            "Whole weights cannot be put into a quantized checkpoint; fuse them into the unquantized one."
        )
    if not dequantize and any(name.endswith(f".{TENSOR_SCALE}") for name in checkpoint.tensors):
        raise AdapterError("This checkpoint keeps NVIDIA's NVFP4 codes, which cannot be made here; add --dequantize.")


def _write(checkpoint: Checkpoint, merging: _Merging, target: Path) -> None:
    """Write the checkpoint's files with other arrays in them."""
    replaced = {f"{path}.{kind}" for path in merging.modules for kind in ("weight", "scales", "biases", TENSOR_SCALE)}
    files: dict[str, list[str]] = {}
    for name, entry in checkpoint.tensors.items():
        files.setdefault(entry.file, []).append(name)
    where: dict[str, str] = {}
    total = 0
    for file, names in sorted(files.items()):
        kept = [name for name in names if name not in replaced and name not in merging.arrays]
        arrays = checkpoint.arrays(kept) | {name: merging.arrays[name] for name in names if name in merging.arrays}
        mx.save_safetensors(str(target / file), arrays, {"format": "mlx"})
        where |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    for name in (*COPIED, "generation_config.json"):
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, target / name)
    config = read_json(checkpoint.directory / "config.json")
    if merging.dequantize:
        for key in ("quantization", "quantization_config"):
            if key in config:
                config[key] |= dict.fromkeys(merging.modules, False)
    write_json(target / "config.json", config)
    write_json(target / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
