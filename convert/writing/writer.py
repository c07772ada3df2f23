"""Safetensors files written as a stream: header first, then every tensor's bytes in order, hashed on the way out."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...config import Quantization
from ..plan import Job, shard_header
from ..reading.reader import MX_DTYPES, Reader, dequantize, slabs
from ..reading.sources import TENSOR_SCALE, Weight

Arrays = tuple[mx.array, ...]
# The error is measured on the first rows of every eighth slab: all of it would double the work.
MEASURED_SLABS, MEASURED_ROWS = 8, 1024


def write_shard(
    path: Path, jobs: Sequence[Job], reader: Reader, dtype: str, tick: Callable[[int, str], None]
) -> tuple[str, dict[str, float]]:
    """Write the file at `path` with the outputs of `jobs`; returns its SHA-256 and the relative error of every module
    that was quantized.

    dtype: of what stays unquantized and of affine scales, in safetensors' spelling. tick: called with the bytes just
    written and the tensor's name. The file is on the disk when this returns.
    """
    digest, errors = hashlib.sha256(), {}
    with path.open("wb") as file:
        header = shard_header(jobs)
        file.write(header)
        digest.update(header)
        for job in jobs:
            loss = Loss()
            for part in job_bytes(job, reader, MX_DTYPES[dtype], loss):
                file.write(part)
                digest.update(part)
                tick(part.nbytes, job.weight.name)
            reader.files.finish(job.weight)
            if loss.reference:
                errors[job.weight.path] = loss.relative
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), errors


@dataclass
class Loss:
    """The loss by quantizing, as sums of squares over the slabs that were measured."""

    error: float = 0.0
    reference: float = 0.0

    @property
    def relative(self) -> float:
        """Norm of the error by norm of the values, to four digits."""
        return float(f"{math.sqrt(self.error / self.reference):.4g}")


def job_bytes(job: Job, reader: Reader, dtype: mx.Dtype, loss: Loss) -> Iterator[memoryview]:
    """The bytes of the job's outputs, one output after the other; `loss` grows meanwhile.

    The first (the weight) is passed on slab by slab; the others, an eighth of its size or less, are kept until then.
    """
    kept: list[Arrays] = []
    for first, *rest in _one_ahead(_encoded(job, reader, dtype, loss)):
        yield _as_bytes(first)
        kept.append(tuple(rest))
    for arrays in zip(*kept, strict=True):
        for array in arrays:
            yield _as_bytes(array)
    scale_shape = job.weight.tensor_scale_shape
    if job.is_carried and scale_shape is not None:
        yield _as_bytes(_tensor_scales(job.weight, scale_shape, reader))


def quantize(values: mx.array, quantization: Quantization) -> Arrays:
    """Quantize `values` [rows, columns] to (weight, scales) and, in affine mode, biases."""
    return tuple(mx.quantize(values, quantization.group_size, quantization.bits, quantization.mode))


def _encoded(job: Job, reader: Reader, dtype: mx.Dtype, loss: Loss) -> Iterator[Arrays]:
    """The arrays of every slab, in the order of the job's outputs, not evaluated yet."""
    for i, (piece, first, count) in enumerate(slabs(job.weight)):
        if job.is_carried:
            weight, scales, *biases = reader.codes(piece.stored, piece.first + first, count)
            yield (weight, scales.astype(dtype), biases[0].astype(dtype)) if biases else (weight, scales)
            continue
        values = reader.decoded(piece, first, count, dtype)
        if job.quantization is None:
            yield (values,)
            continue
        arrays = quantize(values, job.quantization)
        yield arrays
        if i % MEASURED_SLABS == 0:
            _measure(values, arrays, job.quantization, loss)


def _measure(values: mx.array, arrays: Arrays, quantization: Quantization, loss: Loss) -> None:
    rows = slice(0, MEASURED_ROWS)
    decoded = dequantize([array[rows] for array in arrays], quantization)
    values = values[rows].astype(mx.float32)
    loss.error += float(mx.square(values - decoded).sum())
    loss.reference += float(mx.square(values).sum())


def _tensor_scales(weight: Weight, shape: tuple[int, ...], reader: Reader) -> mx.array:
    """The factors beside the block scales, float32, in their `shape`: one per matrix or per row."""
    rows = [reader.row_scales(p.stored, TENSOR_SCALE, p.first, p.rows) for p in weight.pieces]
    per_row = mx.concatenate(rows).reshape(weight.shape[:-1])
    per_matrix = len(shape) < per_row.ndim
    return mx.contiguous(per_row[..., 0] if per_matrix else per_row)


def _one_ahead(slabs: Iterable[Arrays]) -> Iterator[Arrays]:
    """The same arrays, each started before the one before it is handed out: MLX works while we read and write."""
    pending = None
    for arrays in slabs:
        mx.async_eval(arrays)
        if pending is not None:
            yield pending
        pending = arrays
    if pending is not None:
        yield pending


def _as_bytes(array: mx.array) -> memoryview:
    return np.array(array.flatten().view(mx.uint8), copy=False).data.cast("B")
