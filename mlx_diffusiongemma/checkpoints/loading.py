"""Loading a converted checkpoint: ours, mlx-community's, or one saved by mlx-vlm. Strict: nothing missing, nothing
left over, nothing of another shape.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..model.diffusion_gemma import DiffusionGemma
from ..model.joining import fusible
from ..model.moe import Experts
from ..model.scaled import add_tensor_scales
from ..model.vision import VisionModel
from .adapter_files import load_adapter
from .checkpoint import Checkpoint
from .memory import check_fits, set_limits
from .safetensors import Entry

if TYPE_CHECKING:
    from ..processing.processor import Processor

ENCODER = "model.encoder."
VISION = (f"{ENCODER}vision_tower.", f"{ENCODER}embed_vision.")
# Stacked experts without `.weight`, one key per expert, or scales as FP8 and NVFP4 checkpoints name them.
PUBLISHED = re.compile(r"\.experts\.(\d+\.|gate_up_proj$|down_proj$)|\.weight_scale$")
Progress = Callable[[int, int], None]
Tensors = Mapping[str, Entry]


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    fuse: bool = True,
    adapter: str | Path | None = None,
) -> tuple[DiffusionGemma, Processor]:
    """A converted checkpoint's model and processor, weights in memory and safe to use from any thread.

    path_or_repo: a directory or a Hugging Face repository, which is downloaded first. progress: called with layers
    done and their number. fuse: on a GPU, join projections of one input; without it, every module computes on its own.
    adapter: a directory or repository with one that the model is to use, see `load_adapter`.
    Bounds MLX's cache of freed memory, and warns (MemoryWarning) where a long prompt will not fit.
    Raises CheckpointError and AdapterError.
    """
    from ..processing.processor import Processor

    trained = None if adapter is None else load_adapter(adapter)  # what is wrong with it is said before the long part
    checkpoint = Checkpoint.open(path_or_repo, revision)
    config = checkpoint.config
    _check_complete(checkpoint, path_or_repo)
    processor = Processor.from_directory(checkpoint.directory, config)
    check_fits(checkpoint)
    set_limits()
    text, vision = _text_and_vision(checkpoint)
    tower = config.vision if vision else None
    load_tower = None if tower is None else lambda: load_vision(checkpoint)
    model = DiffusionGemma(config, checkpoint.options, load_tower)
    _fit(model, text, checkpoint)
    if tower is not None:
        # Only names and shapes: the weights themselves are read when an image first needs them.
        _fit(VisionModel(tower, config.text.hidden_size), vision, checkpoint, ENCODER)
    # Nothing but the model may hold its arrays: those that it joins or widens, a layer at a time, are freed then.
    model.load_weights(list(checkpoint.arrays(text).items()))
    _evaluate(model, checkpoint.directory, progress, fuse and _fusing_pays())
    model.use_adapter(trained)
    return model, processor


def load_vision(checkpoint: Checkpoint) -> VisionModel:
    """The vision tower and projection, weights in memory. Raises CheckpointError."""
    config = checkpoint.config
    if config.vision is None:
        raise CheckpointError(f"{checkpoint.directory} has no vision tower, so it cannot see images; leave them out.")
    _, tensors = _text_and_vision(checkpoint)
    vision = VisionModel(config.vision, config.text.hidden_size)
    _fit(vision, tensors, checkpoint, ENCODER)
    vision.load_weights([(name.removeprefix(ENCODER), array) for name, array in checkpoint.arrays(tensors).items()])
    _read(vision, checkpoint.directory)
    return vision


def _check_complete(checkpoint: Checkpoint, source: str | Path) -> None:
    """Raise CheckpointError where the tensors are named as a published checkpoint's, with the command to run, or where
    no reply could end.
    """
    if any(PUBLISHED.search(name) for name in checkpoint.tensors):
        command = f"mlx-dg convert {shlex.quote(str(source))} --q4"
        raise CheckpointError(f"{source} is a Hugging Face checkpoint; convert it first: {command}")
    if not checkpoint.options.end_tokens:
        raise CheckpointError(
            f"{source} does not say which tokens end a reply; add eos_token_id to its config.json, in Google's "
            "checkpoints [1, 106, 50]: <eos>, <turn|> and <|tool_response>."
        )


def _text_and_vision(checkpoint: Checkpoint) -> tuple[Tensors, Tensors]:
    """The tensors that are always needed, and those that images need."""
    text: dict[str, Entry] = {}
    vision: dict[str, Entry] = {}
    for name, entry in checkpoint.tensors.items():
        (vision if name.startswith(VISION) else text)[name] = entry
    return text, vision


def _fit(module: nn.Module, tensors: Tensors, checkpoint: Checkpoint, prefix: str = "") -> None:
    """Quantize in a module what has scales in the files, and raise CheckpointError unless it then has exactly these
    tensors, whose names begin with `prefix`.
    """
    _quantize(module, tensors, checkpoint, prefix)
    parameters: dict[str, mx.array] = {}
    tree_flatten(module.parameters(), destination=parameters)
    expected = {prefix + name: array.shape for name, array in parameters.items()}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not part of the model" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.directory} does not fit its configuration: {', '.join(problems[:3])}{more}; "
            "download or convert it again."
        )


def _quantize(module: nn.Module, tensors: Tensors, checkpoint: Checkpoint, prefix: str) -> None:
    """Replace the modules whose scales are in the files."""
    scaled = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    quantization = checkpoint.config.quantization
    if not scaled:
        return
    if quantization is None:
        raise CheckpointError(
            f"{checkpoint.directory} holds quantized weights but config.json has no `quantization`; convert it again."
        )

    def settings(path: str, part: nn.Module) -> bool | dict[str, Any]:
        found = quantization.for_module(prefix + path)
        if prefix + path not in scaled or found is None or not hasattr(part, "to_quantized"):
            return False
        return {"group_size": found.group_size, "bits": found.bits, "mode": found.mode}

    try:
        nn.quantize(module, class_predicate=settings)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.directory}: config.json's quantization does not work ({error}).") from None
    add_tensor_scales(module, {name.removeprefix(prefix): entry.shape for name, entry in tensors.items()})


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
