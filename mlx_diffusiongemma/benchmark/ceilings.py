"""The best that this machine can do: the rates that a step's parts are measured against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx

from .operations import Operation, Product, Storage


@dataclass(frozen=True)
class Machine:
    """Whatever the model: a square matrix product, a copy that reads and writes, and the start of one operation."""

    matrix_operations_per_second: float
    copied_bytes_per_second: float
    launch_seconds: float


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measured operations."""

    width: int
    experts: int
    copied: int  # bytes
    launches: int
    seconds: float


# On a CPU: large enough for a rate, small enough for all of them to take seconds.
GPU_SIZES = Sizes(width=4096, experts=128, copied=1 << 28, launches=2000, seconds=0.2)
CPU_SIZES = Sizes(width=512, experts=4, copied=1 << 26, launches=500, seconds=0.05)
EXPERT_OUTPUTS = 1024


def seconds_of(work: Callable[[], object], least: float) -> float:
    """The median time of `work`, which returns arrays: warmed up, then repeated for `least` seconds, thrice or more."""
    times = _times(work, least)
    return times[len(times) // 2]


def _times(work: Callable[[], object], least: float) -> list[float]:
    """Ascending."""
    mx.eval(work())
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        started = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - started)
    return sorted(times)


class Ceilings:
    """The best rates of operations, measured when they are asked for, since a machine's change from minute to minute.

    best: of every operation so far, floating-point operations per second.
    """

    def __init__(self) -> None:
        self.sizes = CPU_SIZES if mx.default_device() == mx.cpu else GPU_SIZES
        self.best: dict[Operation, float] = {}

    def around(
        self, operations: Iterable[Operation], measure: Callable[[], float]
    ) -> tuple[float, dict[Operation, float]]:
        """Return what `measure` gives, and the operations' rates just before or after it, the higher one of each."""
        works = {operation: _work(operation, self.sizes) for operation in operations}
        before = {operation: self._rate(*work) for operation, work in works.items()}
        measured = measure()
        rates = {operation: max(before[operation], self._rate(*work)) for operation, work in works.items()}
        for operation, rate in rates.items():
            self.best[operation] = max(self.best.get(operation, 0.0), rate)
        return measured, rates

    def _rate(self, count: int, *ways: Callable[[], mx.array]) -> float:
        return count / min(_times(way, self.sizes.seconds)[0] for way in ways)


def measure_machine(dtype: mx.Dtype) -> Machine:
    """Measure the ceilings of this machine. dtype: of the activations, the model's own."""
    sizes = CPU_SIZES if mx.default_device() == mx.cpu else GPU_SIZES
    a, b = _normal((sizes.width, sizes.width), dtype), _normal((sizes.width, sizes.width), dtype)
    source, start = mx.zeros((sizes.copied // 4,), mx.float32), mx.zeros((1,))
    mx.eval(source, start)

    def launches() -> mx.array:
        x = start
        for _ in range(sizes.launches):
            x = mx.abs(x)
        return x

    return Machine(
        2 * sizes.width**3 / _times(lambda: a @ b, sizes.seconds)[0],
        2 * sizes.copied / _times(lambda: source + 1, sizes.seconds)[0],
        _times(launches, sizes.seconds)[0] / sizes.launches,
    )


def _work(operation: Operation, sizes: Sizes) -> tuple[int, *tuple[Callable[[], mx.array], ...]]:
    """How many floating-point operations a measured one is, and the ways to compute it, of which the fastest counts."""
    if not isinstance(operation, Product):
        shape = (1, operation.heads, operation.rows, operation.head_dim)
        queries = _normal(shape, operation.dtype)
        shape = (1, operation.kv_heads, operation.keys, operation.head_dim)
        keys, values = _normal(shape, operation.dtype), _normal(shape, operation.dtype)
        count = 4 * operation.heads * operation.rows * operation.keys * operation.head_dim
        return count, lambda: mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    if operation.rows_each:
        return _experts(operation, sizes)
    storage, width = operation.storage, sizes.width
    outputs = 4 * width
    count = 2 * operation.rows * width * outputs
    x = _normal((operation.rows, width if operation.transposed else outputs), storage.dtype)
    weight = _stored((outputs, width), storage)
    if storage.bits is not None:
        return count, lambda: mx.quantized_matmul(
            x,
            weight[0],
            weight[1],
            weight[2] if len(weight) > 2 else None,
            transpose=operation.transposed,
            group_size=storage.group_size,
            bits=storage.bits,
            mode=storage.mode,
        )
    if not operation.transposed:
        return count, lambda: x @ weight[0]
    # MLX multiplies by a transposed matrix in another way, which is slower on some CPUs.
    turned = mx.contiguous(weight[0].T)
    mx.eval(turned)
    return count, lambda: x @ weight[0].T, lambda: x @ turned


def _experts(operation: Product, sizes: Sizes) -> tuple[int, Callable[[], mx.array]]:
    storage, each = operation.storage, operation.rows_each
    x = _normal((each * sizes.experts, 1, sizes.width), storage.dtype)
    weight = _stored((sizes.experts, EXPERT_OUTPUTS, sizes.width), storage)
    chosen = mx.repeat(mx.arange(sizes.experts), each)
    mx.eval(chosen)
    count = 2 * each * sizes.experts * sizes.width * EXPERT_OUTPUTS
    if storage.bits is None:
        turned = weight[0].swapaxes(-1, -2)
        return count, lambda: mx.gather_mm(x, turned, rhs_indices=chosen, sorted_indices=True)
    return count, lambda: mx.gather_qmm(
        x,
        weight[0],
        weight[1],
        weight[2] if len(weight) > 2 else None,
        rhs_indices=chosen,
        group_size=storage.group_size,
        bits=storage.bits,
        mode=storage.mode,
        sorted_indices=True,
    )


def _stored(shape: tuple[int, ...], storage: Storage) -> list[mx.array]:
    """A matrix as the model stores its own: alone, or with its scales and biases."""
    arrays = [_normal(shape, storage.dtype)]
    if storage.bits is not None:
        arrays = list(mx.quantize(arrays[0], storage.group_size, storage.bits, mode=storage.mode))
    mx.eval(arrays)
    return arrays


def _normal(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    array = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    mx.eval(array)
    return array
