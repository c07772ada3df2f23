"""The plan of a conversion, computed from names and shapes alone: tensors, files, sizes, memory to run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..checkpoints.accounting import CONTEXT, memory_needed
from ..checkpoints.safetensors import ITEM_BYTES, Entry, write_header
from ..config import ModelConfig, Quantization
from ..errors import CheckpointError
from .quantization import ASKED, NVFP4, RECIPES, Scheme, matches
from .reading.names import GROUPS, group_of
from .reading.sources import TENSOR_SCALE, Weight, describe, find_weights, some

SHARD_BYTES = 5_000_000_000
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Output:
    """A tensor to write; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Job:
    """One weight and what becomes of it. `quantization` None: stored in the plan's dtype.

    is_carried: its codes are already what they should become and are copied bit for bit.
    """

    weight: Weight
    group: str
    quantization: Quantization | None
    outputs: tuple[Output, ...]
    is_carried: bool

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Plan:
    """Everything a conversion writes, before it starts. Sizes are bytes."""

    config: ModelConfig
    source: str
    scheme: Scheme
    dtype: str
    shards: tuple[tuple[Job, ...], ...]
    unquantized: tuple[str, ...]

    @property
    def jobs(self) -> list[Job]:
        return [job for shard in self.shards for job in shard]

    @property
    def tensors(self) -> list[Output]:
        return [output for job in self.jobs for output in job.outputs]

    @cached_property
    def total_bytes(self) -> int:
        """The bytes of all tensors, which the index calls `total_size`."""
        return sum(job.nbytes for job in self.jobs)

    @cached_property
    def group_bytes(self) -> dict[str, int]:
        sizes: dict[str, int] = defaultdict(int)
        for job in self.jobs:
            sizes[job.group] += job.nbytes
        return {group: sizes[group] for group in GROUPS if group in sizes}

    @property
    def shard_names(self) -> list[str]:
        count = len(self.shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

    @cached_property
    def file_bytes(self) -> int:
        """The bytes of all weight files, headers included."""
        return self.total_bytes + sum(len(shard_header(shard)) for shard in self.shards)

    @property
    def default_quantization(self) -> Quantization | None:
        """The one that config.json names for the whole model; None when nothing is quantized."""
        if self.scheme.asked and any(job.quantization == self.scheme.asked for job in self.jobs):
            return self.scheme.asked
        return next((job.quantization for job in self.jobs if job.quantization), None)

    def running_bytes(self, context: int = CONTEXT) -> int:
        """Memory for the weights, the K/V of `context` tokens and one denoising step: about, not to the byte."""
        return memory_needed(self.config, self.total_bytes, context, ITEM_BYTES[DTYPES[self.dtype]]).total

    def render(self, errors: Mapping[str, float] | None = None) -> str:
        """The plan as a person reads it; with the relative error of every group, if they are known."""
        lines = [f"Source        {self.source}", f"Recipe        {self.recipe_text}", ""]
        bits = self.group_bits
        for group, size in self.group_bytes.items():
            error = f", error {errors[group]:.2%}" if errors and group in errors else ""
            lines.append(f"  {group:<20} {size / 1e9:>9.3f} GB   {bits[group]}{error}")
        count = f"{len(self.tensors):,} tensors, {self.total_bytes:,} bytes"
        lines += [
            f"  {'total':<20} {self.total_bytes / 1e9:>9.3f} GB   {count}",
            "",
            f"Files         {len(self.shards)}, {self.file_bytes / 1e9:.2f} GB",
            f"To run        about {self.running_bytes() / 1e9:.1f} GB with {CONTEXT:,} tokens of context: "
            f"{fitting_mac(self.running_bytes())}",
        ]
        if self.unquantized:
            lines.append(
                f"Unquantized   {some(list(self.unquantized))}: the group size does not divide their input dimension"
            )
        return "\n".join(lines)

    @property
    def recipe_text(self) -> str:
        """The recipe as a person reads it, and what was changed of it."""
        if self.default_quantization is None:
            return f"none, all {self.dtype}"
        recipe, asked = RECIPES[self.scheme.recipe], self.scheme.asked
        changes = [f"{pattern} {_width(wanted)}" for pattern, wanted in self.scheme.overrides]
        if asked and (asked.mode, asked.bits) != ("affine", recipe.bits):
            groups = [group for group, bits in recipe.groups.items() if bits == ASKED]
            changes.insert(0, f"{', '.join(groups)} {_width(asked)}")
            return f"{self.scheme.recipe}, but {'; '.join(changes)}"
        return f"{self.scheme.recipe}: {recipe.summary}" + "".join(f"; {change}" for change in changes)

    @property
    def group_bits(self) -> dict[str, str]:
        """Say in words how the matrices of every group are stored."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for job in self.jobs:
            if len(job.weight.shape) > 1:
                found[job.group][_label(job.quantization, self.dtype)] = None
        return {group: ", ".join(found[group]) or self.dtype for group in self.group_bytes}


def make_plan(entries: Iterable[Entry], config: ModelConfig, scheme: Scheme, dtype: str) -> Plan:
    """The plan for a checkpoint that holds `entries`. `dtype` is a key of DTYPES. Raises CheckpointError."""
    weights = find_weights(entries, config)
    _check_overrides(scheme, weights)
    jobs, unquantized = [], []
    for weight in weights:
        job = _job(weight, scheme, DTYPES[dtype])
        wanted = _wanted(weight, scheme)
        if wanted and not job.quantization:
            unquantized.append(weight.path)
        jobs.append(job)
    # In the order in which a source read file by file completes them, so that a file can go once it is used up.
    jobs.sort(key=lambda job: max(entry.file for entry in job.weight.entries))
    return Plan(config, describe(weights), scheme, dtype, _shards(jobs), tuple(unquantized))


def shard_header(jobs: Iterable[Job]) -> bytes:
    """The header of the file that holds the outputs of `jobs`."""
    return write_header((o.name, o.dtype, o.shape) for job in jobs for o in job.outputs)


MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GiB
ROOM = 1.05  # for what is not counted
MOST_WIRED = 0.85  # of a Mac's memory, for the GPU, with its limit raised


def gpu_limit(gib: int) -> int:
    """Bytes that macOS lets the GPU of a Mac with `gib` GiB use by default."""
    return gib * (2 << 30) // 3 if gib < 36 else gib * (3 << 30) // 4


def fitting_mac(nbytes: int) -> str:
    """The smallest Mac that runs it with a little room, and a smaller one that would with its limit raised."""
    needed = int(nbytes * ROOM)
    fits = next((gib for gib in MACS if needed <= gpu_limit(gib)), None)
    if fits is None:
        return f"more than the GPU of a {MACS[-1]} GB Mac may use"
    tight = next(gib for gib in MACS if needed <= MOST_WIRED * (gib << 30))
    if tight == fits:
        return f"fits Macs from {fits} GB"
    limit = -(-needed // (100 << 20)) * 100  # MiB
    return f"fits Macs from {fits} GB, or {tight} GB after `sudo sysctl iogpu.wired_limit_mb={limit}`"


def _wanted(weight: Weight, scheme: Scheme) -> Quantization | None:
    if not weight.name.endswith(".weight") or len(weight.shape) < 2:
        return None
    return scheme.for_module(weight.path, group_of(weight.path), weight.quantization == NVFP4)


def _job(weight: Weight, scheme: Scheme, dtype: str) -> Job:
    group, wanted = group_of(weight.path), _wanted(weight, scheme)
    if wanted is None or weight.columns % wanted.group_size:
        return Job(weight, group, None, (Output(weight.name, dtype, weight.shape),), False)
    is_carried = weight.quantization == wanted
    rows, groups = weight.shape[:-1], weight.columns // wanted.group_size
    outputs = [Output(weight.name, "U32", (*rows, weight.columns * wanted.bits // 32))]
    scales = dtype if wanted.mode == "affine" else "U8"
    outputs.append(Output(f"{weight.path}.scales", scales, (*rows, groups)))
    if wanted.mode == "affine":
        outputs.append(Output(f"{weight.path}.biases", scales, (*rows, groups)))
    if is_carried and weight.tensor_scale_shape is not None:
        outputs.append(Output(f"{weight.path}.{TENSOR_SCALE}", "F32", weight.tensor_scale_shape))
    return Job(weight, group, wanted, tuple(outputs), is_carried)


def _shards(jobs: list[Job]) -> tuple[tuple[Job, ...], ...]:
    shards: list[list[Job]] = []
    size = SHARD_BYTES
    for job in jobs:
        needed = job.nbytes + 512 * len(job.outputs)  # with its part of the header
        if size + needed > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += needed
    return tuple(tuple(shard) for shard in shards)


def _check_overrides(scheme: Scheme, weights: list[Weight]) -> None:
    for pattern, _ in scheme.overrides:
        if not any(matches(weight.path, pattern) for weight in weights if len(weight.shape) > 1):
            raise CheckpointError(
                f"No module is called {pattern!r}; give a pattern such as 'layers.0.*' or 'layers.*.self_attn.v_proj'."
            )


def _width(quantization: Quantization | None) -> str:
    """What a recipe or an override asks for, in words."""
    if quantization is None:
        return "unquantized"
    return f"at {quantization.bits} bits" if quantization.mode == "affine" else f"in {quantization.mode}"


def _label(quantization: Quantization | None, dtype: str) -> str:
    if quantization is None:
        return dtype
    if quantization.mode == "affine":
        return f"{quantization.bits}-bit, group size {quantization.group_size}"
    return quantization.mode
