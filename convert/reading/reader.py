"""Stored rows become arrays: slices by `pread`, checked for NaN and decoded, never a whole tensor and never mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...checkpoints.safetensors import ITEM_BYTES, Entry, read_header
from ...config import Quantization
from ...errors import CheckpointError
from ..writing.hashes import file_sha256, known_sha256
from .sources import TENSOR_SCALE, Piece, Stored, Weight

SLAB_BYTES = 32 << 20  # decoded values read at a time
CHECK_ITEMS = 1 << 18  # values checked at a time: they stay in the processor's cache
MX_DTYPES = {
    **{"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32},
    **{"U8": mx.uint8, "U32": mx.uint32, "F8_E4M3": mx.uint8},
}
CODE_ROLES = ("weight", "scales", "weight_scale", "biases")  # of MLX and of NVFP4, in MLX's order
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# The bits that are all set in a value that is not finite.
NOT_FINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F8_E4M3": 0x7F}


class Files:
    """The safetensors files of a directory, opened when first read. `close` it, or use it in a `with` statement."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._opened: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._opened):
            self.close(name)

    def open(self, name: str) -> tuple[int, int]:
        """The descriptor of a file and the byte where its data begins. Raises CheckpointError."""
        if name not in self._opened:
            path = self.provide(name)
            _, data = read_header(path)
            self._opened[name] = os.open(path, os.O_RDONLY), data
        return self._opened[name]

    def close(self, name: str) -> None:
        if name in self._opened:
            os.close(self._opened.pop(name)[0])

    def provide(self, name: str) -> Path:
        """The path of a file, which is there and whole once this returns. Raises CheckpointError."""
        path = self.directory / name
        known = known_sha256(path)
        if known and file_sha256(path) != known:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not {known}; download it again.")
        return path

    def finish(self, weight: Weight) -> None:
        """Nothing of `weight` will be read again."""


class Reader:
    """Reads rows of stored tensors out of `files`."""

    def __init__(self, files: Files, allow_nan: bool = False) -> None:
        self.files = files
        self.allow_nan = allow_nan

    def rows(self, entry: Entry, first: int, count: int) -> mx.array:
        """Rows [first, first + count) of a stored tensor, [count, columns]; FP8 as uint8.

        Raises CheckpointError when the file ends early or a value is not finite.
        """
        columns = entry.shape[-1] if entry.shape else 1
        values = np.empty(count * columns, UNSIGNED[ITEM_BYTES[entry.dtype]])
        self._fill(entry, first * columns * ITEM_BYTES[entry.dtype], values)
        if not self.allow_nan and entry.dtype in NOT_FINITE and not _is_finite(values, NOT_FINITE[entry.dtype]):
            raise CheckpointError(
                f"{entry.file}: {entry.name} holds NaN or infinite values; use another checkpoint, or allow them "
                "(--allow-nan) if you know why they are there."
            )
        return mx.array(values).view(MX_DTYPES[entry.dtype]).reshape(count, columns)

    def row_scales(self, stored: Stored, role: str, first: int, count: int) -> mx.array:
        """Read a scale for each of the rows [first, first + count), float32 [count, 1]; rows can share a stored one."""
        entry, each = stored.entries[role], stored.rows_per_scale(role)
        column = replace(entry, shape=(stored.rows // each, 1))
        low, high = first // each, (first + count - 1) // each + 1
        return self.rows(column, low, high - low).astype(mx.float32)[mx.arange(first, first + count) // each - low]

    def codes(self, stored: Stored, first: int, count: int) -> list[mx.array]:
        """Read what MLX calls weight, scales and, in affine mode, biases of rows [first, first + count)."""
        found = [self.rows(stored.entries[role], first, count) for role in CODE_ROLES if role in stored.entries]
        return [found[0].view(mx.uint32), *found[1:]]

    def decoded(self, piece: Piece, first: int, count: int, dtype: mx.Dtype) -> mx.array:
        """Rows [first, first + count) of a piece as values, [count, columns]. Raises CheckpointError."""
        stored = piece.stored
        if stored.quantization is None:
            values = DECODERS[stored.encoding](self, stored, piece.first + first, count)
        else:
            values = _quantized(self, stored, stored.quantization, piece.first + first, count)
        narrowed = values.astype(dtype)
        if dtype == mx.float16 and values.dtype != dtype and not self.allow_nan and not mx.isfinite(narrowed).all():
            raise CheckpointError(f"{stored.weight.name} has values beyond float16's range; keep bfloat16 or float32.")
        return narrowed

    def _fill(self, entry: Entry, offset: int, values: np.ndarray) -> None:
        descriptor, data = self.files.open(entry.file)
        view, position = values.data.cast("B"), data + entry.begin + offset
        while view:
            got = os.preadv(descriptor, [view], position)
            if got == 0:
                raise CheckpointError(f"{entry.file} ends inside {entry.name}; download it again.")
            view, position = view[got:], position + got


def slabs(weight: Weight) -> Iterator[tuple[Piece, int, int]]:
    """The rows of `weight` in order, as (piece, first row within it, number of rows) of bounded size."""
    limit = max(1, SLAB_BYTES // (2 * weight.columns))
    for piece in weight.pieces:
        for first in range(0, piece.rows, limit):
            yield piece, first, min(limit, piece.rows - first)


def _plain(reader: Reader, stored: Stored, first: int, count: int) -> mx.array:
    return reader.rows(stored.weight, first, count)


def _fp8(reader: Reader, stored: Stored, first: int, count: int) -> mx.array:
    values = mx.from_fp8(reader.rows(stored.weight, first, count), dtype=mx.float32)
    return values * reader.row_scales(stored, "weight_scale", first, count)


def _quantized(reader: Reader, stored: Stored, codes: Quantization, first: int, count: int) -> mx.array:
    weight, scales, *biases = reader.codes(stored, first, count)
    if biases:
        scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
    values = dequantize([weight, scales, *biases], codes, mx.float32)
    if TENSOR_SCALE in stored.entries:
        values *= reader.row_scales(stored, TENSOR_SCALE, first, count)
    return values


def dequantize(arrays: Sequence[mx.array], codes: Quantization, dtype: mx.Dtype | None = None) -> mx.array:
    """The values of (weight, scales) and, in affine mode, biases."""
    weight, scales, *biases = arrays
    bias = biases[0] if biases else None
    return mx.dequantize(weight, scales, bias, codes.group_size, codes.bits, codes.mode, dtype=dtype)


DECODERS = {"plain": _plain, "fp8": _fp8}  # of what MLX has no codes for


def _is_finite(values: np.ndarray, mask: int) -> bool:
    bits = np.empty(min(values.size, CHECK_ITEMS), values.dtype)
    for first in range(0, values.size, CHECK_ITEMS):
        part = values[first : first + CHECK_ITEMS]
        if np.bitwise_and(part, values.dtype.type(mask), out=bits[: part.size]).max() == mask:
            return False
    return True
