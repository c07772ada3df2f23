"""Loading a converted checkpoint: ours, mlx-community's, or one saved by mlx-vlm. Strict: nothing missing, nothing
left over, nothing of another shape.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import ModelConfig, Quantization, read_json
from ..errors import CheckpointError
from ..model.diffusion_gemma import DiffusionGemma
from ..model.joining import fusible
from ..model.moe import Experts
from ..model.scaled import add_tensor_scales
from ..model.vision import VisionModel
from ..options import GenerationOptions
from ..paths import user_path
from .hub import CONVERTED, download_snapshot, is_repository
from .memory import check_fits, set_limits

if TYPE_CHECKING:
    from ..processing.processor import Processor

ENCODER = "model.encoder."
VISION = (f"{ENCODER}vision_tower.", f"{ENCODER}embed_vision.")
# Stacked experts without `.weight`, one key per expert, or scales as FP8 and NVFP4 checkpoints name them.
PUBLISHED = re.compile(r"\.experts\.(\d+\.|gate_up_proj$|down_proj$)|\.weight_scale$")
ACTIVATIONS_AS = "model.decoder.norm.weight"  # is never quantized: activations have its type
Progress = Callable[[int, int], None]


def load(
    path_or_repo: str | Path, *, revision: str | None = None, progress: Progress | None = None, fuse: bool = True
) -> tuple[DiffusionGemma, Processor]:
    """A converted checkpoint's model and processor, weights in memory and safe to use from any thread.

    path_or_repo: a directory or a Hugging Face repository, which is downloaded first. progress: called with layers
    done and their number. fuse: on a GPU, join projections of one input; without it, every module computes on its own.
    Bounds MLX's cache of freed memory, and warns (MemoryWarning) where a long prompt will not fit.
    Raises CheckpointError.
    """
    from ..processing.processor import Processor

    directory = find_checkpoint(path_or_repo, revision)
    config = ModelConfig.from_directory(directory)
    processor = Processor.from_directory(directory, config)
    weights = read_weights(directory)
    _check_converted(weights, path_or_repo)
    item = weights[ACTIVATIONS_AS].itemsize if ACTIVATIONS_AS in weights else 2
    check_fits(config, sum(array.nbytes for array in weights.values()), directory, item)
    set_limits()
    vision = {name: weights.pop(name) for name in list(weights) if name.startswith(VISION)}
    has_vision = bool(vision) and config.vision is not None
    model = DiffusionGemma(
        config,
        GenerationOptions.from_checkpoint(directory),
        load_vision=(lambda: load_vision(directory, config)) if has_vision else None,
    )
    _fill(model, weights, directory, config.quantization)
    if has_vision:
        # Only their names and shapes: the weights themselves are read when an image first needs them.
        _fill(VisionModel(config.vision, config.text.hidden_size), vision, directory, config.quantization, ENCODER)
    _evaluate(model, directory, progress, fuse and _fusing_pays())
    return model, processor


def load_vision(directory: Path, config: ModelConfig) -> VisionModel:
    """The vision tower and projection, weights in memory. Raises CheckpointError."""
    weights = {name: array for name, array in read_weights(directory).items() if name.startswith(VISION)}
    vision = VisionModel(config.vision, config.text.hidden_size)
    _fill(vision, weights, directory, config.quantization, ENCODER)
    _read(vision, directory)
    return vision


def find_checkpoint(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local directory of a checkpoint, downloaded where it is a repository's name. Raises CheckpointError."""
    if is_repository(path_or_repo):
        return download_snapshot(str(path_or_repo), revision, CONVERTED)
    return user_path(path_or_repo)


def read_weights(directory: Path) -> dict[str, mx.array]:
    """Every tensor of the directory's safetensors files, not read yet. Raises CheckpointError."""
    weights: dict[str, mx.array] = {}
    for path in _shards(directory):
        try:
            weights.update(mx.load(str(path)))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); download or convert it again.") from None
    return weights


def _check_converted(weights: dict[str, mx.array], source: str | Path) -> None:
    """Raises CheckpointError, with the command to run, where the tensors are named as a published checkpoint's."""
    if any(PUBLISHED.search(name) for name in weights):
        command = f"mlx-dg convert {shlex.quote(str(source))} --q4"
        raise CheckpointError(f"{source} is a Hugging Face checkpoint; convert it first: {command}")


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(f"{directory} has no model.safetensors; give a directory with a whole checkpoint.")
        return [single]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to files; download it again.")
    paths = [directory / name for name in sorted(set(names.values()))]
    for path in paths:
        if path.parent != directory:
            raise CheckpointError(f"{index} names a file outside its directory ({path}); download it again.")
        if not path.exists():
            raise CheckpointError(f"{index} lists {path.name}, which is not there; download it again.")
    return paths


def _fill(
    module: nn.Module,
    weights: dict[str, mx.array],
    directory: Path,
    quantization: Quantization | None,
    prefix: str = "",
) -> None:
    """Give a module its weights, which are exactly those of the files whose names begin with `prefix`; what has scales
    there becomes quantized.
    """
    _quantize(module, weights, quantization, directory, prefix)
    expected = {prefix + name: array for name, array in tree_flatten(module.parameters())}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not part of the model" for name in weights if name not in expected]
    problems += [
        f"{name} is {list(weights[name].shape)} instead of {list(array.shape)}"
        for name, array in expected.items()
        if name in weights and weights[name].shape != array.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{directory} does not fit its configuration: {', '.join(problems[:3])}{more}; "
            "download or convert it again."
        )
    module.load_weights([(name.removeprefix(prefix), array) for name, array in weights.items()])


def _quantize(
    module: nn.Module,
    weights: dict[str, mx.array],
    quantization: Quantization | None,
    directory: Path,
    prefix: str,
) -> None:
    """Replace the modules whose scales are in the files."""
    scaled = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    if not scaled:
        return
    if quantization is None:
        raise CheckpointError(
            f"{directory} holds quantized weights but config.json has no `quantization`; convert it again."
        )

    def settings(path: str, part: nn.Module) -> bool | dict[str, Any]:
        found = quantization.for_module(prefix + path)
        if prefix + path not in scaled or found is None or not hasattr(part, "to_quantized"):
            return False
        return {"group_size": found.group_size, "bits": found.bits, "mode": found.mode}

    try:
        nn.quantize(module, class_predicate=settings)
    except ValueError as error:
        raise CheckpointError(f"{directory}: config.json's quantization does not work ({error}).") from None
    add_tensor_scales(module, {name.removeprefix(prefix): array for name, array in weights.items()})


def _fusing_pays() -> bool:
    """It saves a GPU launches. What is joined leaves a CPU's caches: q, k and v of the published sizes in 8 bits, which
    take 0.96 s for 64 tokens, take 1.16 s.
    """
    return mx.default_device() == mx.gpu


def _evaluate(model: DiffusionGemma, directory: Path, progress: Progress | None, fuse: bool) -> None:
    """Read the weights in, a layer at a time: a fused layer's own copies are gone before the next is read."""
    layers = model.model.decoder.layers
    on_cpu = mx.default_device() == mx.cpu
    for done, layer in enumerate(layers, start=1):
        if on_cpu:
            _widen(layer.experts)
        if fuse:
            for module in fusible(layer):
                module.fuse()
        _read(layer, directory)
        if progress:
            progress(done, len(layers))
    if fuse:
        model.model.decoder.self_conditioning.fuse()
    _read(model, directory)


def _read(module: nn.Module, directory: Path) -> None:
    try:
        mx.eval(module)
    except RuntimeError as error:
        raise CheckpointError(f"{directory} cannot be read ({error}); download or convert it again.") from None


def _widen(experts: Experts) -> None:
    """On the CPU, MLX gathers float32 only."""
    for module in (experts.gate_up_proj, experts.down_proj):
        if "scales" not in module and module.weight.dtype != mx.float32:
            module.weight = module.weight.astype(mx.float32)
