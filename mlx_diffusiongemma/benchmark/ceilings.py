"""The best that this machine can do: the rates that a step's parts are measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import mlx.core as mx

# Activations of a canvas, and rows that each expert gets of it.
ROWS, EXPERT_ROWS = 256, 16


@dataclass(frozen=True)
class Ceilings:
    """Floating-point operations per second; `copy` in bytes per second, read and written; `launch` in seconds."""

    matmul: float
    quantized: float  # 8 bits, [256, inputs] @ weight.T, as projections and the head compute it
    quantized_plain: float  # 8 bits, [256, inputs] @ weight, as the soft embedding does
    experts: float  # 4 bits, gathered, 16 rows for each expert
    attention_256: float  # 256 queries of head_dim 256
    attention_512: float
    copy: float
    launch: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measured operations."""

    width: int
    experts: int
    keys: int
    copied: int  # bytes
    launches: int
    seconds: float


# On a CPU: large enough for a rate, small enough for all of them to take seconds.
GPU_SIZES = Sizes(width=4096, experts=128, keys=1280, copied=1 << 28, launches=2000, seconds=0.5)
CPU_SIZES = Sizes(width=512, experts=4, keys=256, copied=1 << 26, launches=500, seconds=0.1)


def seconds_of(work: Callable[[], object], least: float) -> float:
    """The median time of `work`, which returns arrays: warmed up, then repeated for `least` seconds, thrice or more."""
    mx.eval(work())
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        started = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def measure_ceilings(dtype: mx.Dtype, on_cpu: bool) -> Ceilings:
    """Measure the ceilings of this machine. dtype: of the activations, the model's own."""
    sizes = CPU_SIZES if on_cpu else GPU_SIZES
    return Ceilings(
        matmul=_matmul(sizes, dtype),
        quantized=_quantized(sizes, dtype, transpose=True),
        quantized_plain=_quantized(sizes, dtype, transpose=False),
        experts=_experts(sizes, dtype),
        attention_256=_attention(sizes, dtype, 256),
        attention_512=_attention(sizes, dtype, 512),
        copy=_copy(sizes),
        launch=_launch(sizes),
    )


def _matmul(sizes: Sizes, dtype: mx.Dtype) -> float:
    a, b = _normal((sizes.width, sizes.width), dtype), _normal((sizes.width, sizes.width), dtype)
    return 2 * sizes.width**3 / seconds_of(lambda: a @ b, sizes.seconds)


def _quantized(sizes: Sizes, dtype: mx.Dtype, transpose: bool) -> float:
    x = _normal((ROWS, sizes.width), dtype)
    weight = mx.quantize(_normal((sizes.width, sizes.width), dtype), bits=8)
    mx.eval(weight)
    taken = seconds_of(lambda: mx.quantized_matmul(x, *weight, transpose=transpose, bits=8), sizes.seconds)
    return 2 * ROWS * sizes.width**2 / taken


def _experts(sizes: Sizes, dtype: mx.Dtype) -> float:
    rows = EXPERT_ROWS * sizes.experts
    x = _normal((rows, 1, sizes.width), dtype)
    weight = mx.quantize(_normal((sizes.experts, 1024, sizes.width), dtype), bits=4)
    chosen = mx.repeat(mx.arange(sizes.experts), EXPERT_ROWS)
    mx.eval(weight, chosen)

    def work() -> mx.array:
        return mx.gather_qmm(x, *weight, rhs_indices=chosen, bits=4, sorted_indices=True)

    return 2 * rows * sizes.width * 1024 / seconds_of(work, sizes.seconds)


def _attention(sizes: Sizes, dtype: mx.Dtype, head_dim: int) -> float:
    heads, kv_heads = 16, 8 if head_dim == 256 else 2
    queries = _normal((1, heads, ROWS, head_dim), dtype)
    keys, values = (_normal((1, kv_heads, sizes.keys, head_dim), dtype) for _ in range(2))

    def work() -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0)

    return 4 * heads * ROWS * sizes.keys * head_dim / seconds_of(work, sizes.seconds)


def _copy(sizes: Sizes) -> float:
    source = mx.zeros((sizes.copied // 4,), mx.float32)
    mx.eval(source)
    return 2 * sizes.copied / seconds_of(lambda: source + 1, sizes.seconds)


def _launch(sizes: Sizes) -> float:
    start = mx.zeros((1,))

    def work() -> mx.array:
        x = start
        for _ in range(sizes.launches):
            x = mx.abs(x)
        return x

    return seconds_of(work, sizes.seconds) / sizes.launches


def _normal(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    array = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    mx.eval(array)
    return array
