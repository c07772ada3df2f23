"""Where every weight of a checkpoint lies: one table of name rules, one of encodings, and strictness about both.

A `Weight` of the MLX layout is a run of rows (everything but the last axis, flattened). Its pieces say which rows of
which stored tensors make it up, so stacked experts, one key per expert, and gate and up apart or together are read
the same way. Nothing here touches the data.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...checkpoints.safetensors import Entry
from ...config import ModelConfig, Quantization
from ...errors import CheckpointError
from ..quantization import NVFP4
from .names import DROPPED, expected_tensors, layout_name, module_path

ROLES = "weight_scale_2|weight_scale|weight|input_scale|scales|biases"
# How a key names a module, the expert and projection within a stack, and its role beside the weight.
# The first rule that matches the whole key; a key that none matches is a plain tensor.
NAME_RULES = (
    rf"(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate_up|gate|up|down)_proj\.(?P<role>{ROLES})",
    rf"(?P<module>.+\.experts)\.(?P<part>gate_up|gate|up|down)_proj(?:\.(?P<role>{ROLES}))?",
    rf"(?P<module>.+)\.(?P<role>{ROLES})",
)
STACKS = {"gate_up": ("gate", "up"), "down": ()}  # stored whole, or as these halves one after the other
FLOATS = ("BF16", "F16", "F32")
TENSOR_SCALE = "weight_scale_2"  # float32, beside NVFP4's block scales


@dataclass(frozen=True)
class Encoding:
    """A way to store a weight: the types of its `weight`, and of the tensors that must and may lie beside it."""

    summary: str
    dtypes: tuple[str, ...]
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    may_have: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


ENCODINGS = {
    "plain": Encoding("unquantized", FLOATS),
    "fp8": Encoding(
        "FP8 (e4m3) with a scale per channel",
        dtypes=("F8_E4M3",),
        needs={"weight_scale": FLOATS},
        may_have={"input_scale": FLOATS},
    ),
    "nvfp4": Encoding(
        "NVFP4 with a scale per 16 values and per tensor",
        dtypes=("U8",),
        needs={"weight_scale": ("F8_E4M3",), TENSOR_SCALE: ("F32",)},
        may_have={"input_scale": FLOATS},
    ),
    "mlx affine": Encoding("quantized by MLX", dtypes=("U32",), needs={"scales": FLOATS, "biases": FLOATS}),
    "mlx float": Encoding(
        "quantized by MLX", dtypes=("U32",), needs={"scales": ("U8",)}, may_have={TENSOR_SCALE: ("F32",)}
    ),
}


@dataclass(frozen=True)
class Stored:
    """A tensor as its file holds it: `entries` by role, `shape` of the decoded values.

    `quantization` is what MLX calls its codes, None where MLX has no such codes.
    """

    encoding: str
    entries: Mapping[str, Entry]
    shape: tuple[int, ...]
    quantization: Quantization | None = None

    @property
    def weight(self) -> Entry:
        return self.entries["weight"]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    def rows_per_scale(self, role: str) -> int:
        """The number of rows in succession that share one of the scales under `role`."""
        return self.rows // math.prod(self.entries[role].shape)


@dataclass(frozen=True)
class Piece:
    """Rows [first, first + rows) of a stored tensor."""

    stored: Stored
    first: int
    rows: int


@dataclass(frozen=True)
class Weight:
    """A tensor of the MLX layout, unquantized: `pieces` hold its rows in order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def path(self) -> str:
        return module_path(self.name)

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def quantization(self) -> Quantization | None:
        """The quantization of every piece in MLX's terms; None unless all agree."""
        found = {piece.stored.quantization for piece in self.pieces}
        return found.pop() if len(found) == 1 else None

    @property
    def tensor_scale_shape(self) -> tuple[int, ...] | None:
        """One scale per matrix, or per row where gate and up have their own; None without such scales."""
        scaled = [piece for piece in self.pieces if TENSOR_SCALE in piece.stored.entries]
        if not scaled:
            return None
        matrix_rows = self.shape[-2]
        per_matrix = all(piece.stored.rows_per_scale(TENSOR_SCALE) % matrix_rows == 0 for piece in scaled)
        return self.shape[:-2] if per_matrix else self.shape[:-1]

    @property
    def entries(self) -> list[Entry]:
        return [entry for piece in self.pieces for entry in piece.stored.entries.values()]


Stack = dict[tuple[str, int | None], dict[str, Entry]]  # (part, expert) → role → entry


def find_weights(entries: Iterable[Entry], config: ModelConfig) -> list[Weight]:
    """Every weight that `config` asks for, in the order of the layout, each made of `entries`.

    Raises CheckpointError that names tensors missing, left over, of a wrong shape or without their scales.
    """
    modules = _by_module(entries)
    weights, missing = [], []
    for published, shape in expected_tensors(config).items():
        name = layout_name(published)
        if name is None:
            continue
        stack = modules.pop(module_path(name), None)
        absent = _absent(stack, module_path(name), shape) if stack else [published]
        missing += absent
        if stack and not absent:
            weights.append(Weight(name, shape, _pieces(stack, module_path(name), shape, config)))
    if missing:
        raise CheckpointError(f"The checkpoint lacks {some(missing)}; download it again or check its configuration.")
    extra = sorted(e.name for stack in modules.values() for tensor in stack.values() for e in tensor.values())
    if extra:
        raise CheckpointError(f"The checkpoint has {some(extra)}, which its configuration has no place for; check it.")
    return weights


def describe(weights: Iterable[Weight]) -> str:
    """Say in one line what kind of checkpoint the weights come from."""
    sizes: dict[str, int] = defaultdict(int)
    codes: dict[Quantization, int] = defaultdict(int)
    per_expert = False
    for weight in weights:
        for piece in weight.pieces:
            stored = piece.stored
            label = ENCODINGS[stored.encoding].summary
            sizes[f"{label} {stored.weight.dtype}" if stored.encoding == "plain" else label] += math.prod(stored.shape)
            if stored.quantization and stored.weight.dtype == "U32":
                codes[stored.quantization] += math.prod(stored.shape)
        per_expert |= len(weight.pieces) > 2 and len(weight.shape) == 3
    main = " and ".join(sorted(sizes, key=sizes.__getitem__, reverse=True)[:2])
    if codes:
        most = max(codes, key=codes.__getitem__)
        main += f" (mostly {most.mode} {most.bits}-bit, group size {most.group_size})"
    return f"{main}, {'one key per expert' if per_expert else 'stacked experts'}"


def some(names: list[str]) -> str:
    """At most three of the names, then a count."""
    listed = ", ".join(names[:3])
    return f"{listed} and {len(names) - 3} more tensors" if len(names) > 3 else listed


def _by_module(entries: Iterable[Entry]) -> dict[str, Stack]:
    modules: dict[str, Stack] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        if any(re.fullmatch(pattern, entry.name) for pattern in DROPPED):
            continue
        found = next((match for rule in NAME_RULES if (match := re.fullmatch(rule, entry.name))), None)
        named = found.groupdict() if found else {"module": entry.name}
        part, expert = named.get("part") or "", named.get("expert")
        stack = next((whole for whole, halves in STACKS.items() if part in (whole, *halves)), None)
        path = f"{named['module']}.{stack}_proj" if stack else named["module"]
        modules[path][part, None if expert is None else int(expert)][named.get("role") or "weight"] = entry
    return modules


def _keys(stack: Stack, path: str, shape: tuple[int, ...]) -> list[tuple[str, int | None]]:
    """The keys of `stack` that make up the weight at `path`, in the order of its rows."""
    whole = next((part for part in STACKS if path.endswith(f".experts.{part}_proj")), "")
    apart = {part for part, _ in stack} & set(STACKS.get(whole, ()))
    parts = STACKS[whole] if apart else (whole,)
    experts = range(shape[0]) if any(expert is not None for _, expert in stack) else (None,)
    return [(part, expert) for expert in experts for part in parts]


def _absent(stack: Stack, path: str, shape: tuple[int, ...]) -> list[str]:
    """The keys that the weight at `path` still needs, named as the checkpoint would name them."""
    absent = [key for key in _keys(stack, path, shape) if "weight" not in stack.get(key, {})]
    home = path.rpartition(".")[0]
    return [
        ".".join([home, *([str(e)] if e is not None else []), f"{part}_proj.weight"]) if part else f"{path}.weight"
        for part, e in absent
    ]


def _pieces(stack: Stack, path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[Piece, ...]:
    """The pieces of the weight at `path`, which has all its keys in `stack`."""
    keys = _keys(stack, path, shape)
    left_over = [entry.name for key in stack if key not in keys for entry in stack[key].values()]
    if left_over:
        raise CheckpointError(f"The checkpoint has {some(sorted(left_over))} beside other weights of {path}; keep one.")
    part_count = len({part for part, _ in keys})
    stored_shape = shape if keys[0][1] is None else shape[1:]
    if part_count > 1:
        stored_shape = (*stored_shape[:-2], stored_shape[-2] // part_count, stored_shape[-1])
    found = [_stored(stack[key], path, stored_shape, config) for key in keys]
    if part_count > 1 and keys[0][1] is None:  # both halves stacked: expert by expert, gate before up
        rows = stored_shape[-2]
        return tuple(Piece(stored, expert * rows, rows) for expert in range(shape[0]) for stored in found)
    return tuple(Piece(stored, 0, stored.rows) for stored in found)


def _stored(entries: dict[str, Entry], path: str, shape: tuple[int, ...], config: ModelConfig) -> Stored:
    weight = entries["weight"]
    codes = None
    if weight.dtype == "U32":
        codes = config.quantization.for_module(path) if config.quantization else None
        if codes is None:
            raise CheckpointError(f"{_at(weight)} is quantized, but config.json does not say how; download it again.")
        encoding = "mlx affine" if codes.mode == "affine" else "mlx float"
    else:
        encoding = next((name for name, kind in ENCODINGS.items() if weight.dtype in kind.dtypes), "")
        if not encoding:
            raise CheckpointError(f"{_at(weight)} has the type {weight.dtype}, which is not read; save it in bfloat16.")
    if encoding == "nvfp4":
        codes = NVFP4
    _check_companions(entries, ENCODINGS[encoding])
    kept = {role: entry for role, entry in entries.items() if role != "input_scale"}
    stored = Stored(encoding, kept, shape, codes)
    _check_shapes(stored)
    return stored


def _check_companions(entries: dict[str, Entry], kind: Encoding) -> None:
    """The tensors beside a weight must be those of its encoding, of the right types."""
    weight = entries["weight"]
    missing = [role for role in kind.needs if role not in entries]
    if missing:
        raise CheckpointError(
            f"{_at(weight)} is {weight.dtype} without its {missing[0]}; download the checkpoint again."
        )
    allowed = {"weight": kind.dtypes, **kind.needs, **kind.may_have}
    for role, entry in sorted(entries.items()):
        if entry.dtype not in allowed.get(role, ()):
            raise CheckpointError(
                f"{_at(entry)}, of type {entry.dtype}, does not belong beside a weight of type {weight.dtype}; check "
                "where the checkpoint comes from."
            )


def _check_shapes(stored: Stored) -> None:
    *rows, columns = stored.shape or (1,)
    expected = {"weight": stored.shape}
    if stored.encoding == "nvfp4":
        expected = {"weight": (*rows, columns // 2), "weight_scale": (*rows, columns // NVFP4.group_size)}
    elif codes := stored.quantization:
        groups = (*rows, columns // codes.group_size)
        expected = {"weight": (*rows, columns * codes.bits // 32), "scales": groups}
        expected |= {"biases": groups} if "biases" in stored.entries else {}
    for role, shape in expected.items():
        entry = stored.entries[role]
        if entry.shape != shape:
            raise CheckpointError(
                f"{_at(entry)} has the shape {list(entry.shape)} instead of {list(shape)}; it does not fit config.json."
            )
    for role in set(stored.entries) - set(expected):
        _check_row_scale(stored, stored.entries[role])


def _check_row_scale(stored: Stored, entry: Entry) -> None:
    """A scale must be one number, or one per leading row axis such as channels or experts."""
    sizes = list(entry.shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    if sizes != list(stored.shape[: len(sizes)]) or len(sizes) == len(stored.shape):
        raise CheckpointError(
            f"{_at(entry)} has the shape {list(entry.shape)}: scales of blocks are not supported here, only one per "
            "channel or tensor; use another checkpoint."
        )


def _at(entry: Entry) -> str:
    return f"{entry.file}: {entry.name}" if entry.file else entry.name
