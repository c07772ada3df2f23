"""What a piece of work would launch on a GPU, counted from its graph: nothing is computed.

MLX's fast functions are one kernel each where they are fused and a dozen operations where they fall back, and chains
under `mx.compile` are one kernel on a GPU and left apart on a CPU. To give the same number everywhere, each call of
one of them counts as one, and its insides are left out of the graph.

Some kernels read rows that lie together, and copy what does not: a launch that no graph shows. Those copies are counted
too, by giving every array of the graph the strides it would have on Metal. What is assumed: results, inputs and
constants lie row by row, and a head size is not one that MLX's attention fuses, which would spare the copy behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

# Operations that only look at their input in another way, or that are constants of a graph.
RESHAPES = {"ExpandDims", "Flatten", "Reshape", "Squeeze", "Unflatten"}
NO_KERNEL = RESHAPES | {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Depends",
    "Full",
    "Slice",
    "Split",
    "StopGradient",
    "Transpose",
    "View",
    "contiguous",
}
FAST = [
    (mx, "contiguous"),
    (mx, "dequantize"),
    (mx.fast, "rms_norm"),
    (mx.fast, "rope"),
    (mx.fast, "scaled_dot_product_attention"),
]
MARK = mx.uint64  # type of a constant that tells one call of a fused function from another; no model has it
Target = tuple[object, str]  # where a function lives, and its name there


@dataclass(frozen=True)
class Node:
    """One operation, and what it gives."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]


@dataclass
class Graph:
    """`nodes`: every operation outside the fused ones. `fused`: calls of each of those, by name. `copies`: of inputs
    whose rows do not lie together, by the name of the operation that asks for it.
    """

    nodes: list[Node] = field(default_factory=list)
    fused: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    @property
    def kernels(self) -> Counter[str]:
        """Launches, by name."""
        names = self.fused + Counter(node.name for node in self.nodes)
        return Counter({name: count for name, count in names.items() if name not in NO_KERNEL})

    @property
    def count(self) -> int:
        return self.kernels.total()


def graph_of(function: Callable[..., Any], *inputs: mx.array, compiled: list[Target] | None = None) -> Graph:
    """The graph of `function(*inputs)`, which returns arrays.

    compiled: the chains of elementwise operations, beside MLX's fast functions, that a GPU runs as one kernel.
    """
    reader = _Reader()
    with _fused([*FAST, *(compiled or [])], reader.calls):
        mx.export_function(reader, function, *inputs)
    return reader.graph


class _Reader:
    """Takes in a graph, part by part as MLX exports it."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.calls: list[str] = []  # of fused functions; a call is known by its number
        self.numbers: dict[str, int] = {}  # by the id of the constant that holds it
        self.layouts: dict[str, np.ndarray] = {}  # of arrays that may not lie row by row

    def __call__(self, part: dict[str, Any]) -> None:
        if part["type"] == "constants":
            self.numbers = {name: value.item() for name, value in part["constants"] if value.dtype == MARK}
        elif part["type"] == "primitive":
            self._add(part["name"], part["arguments"], part["inputs"], part["outputs"])

    def _add(self, name: str, arguments: list[Any], inputs: list[Any], outputs: list[Any]) -> None:
        numbers = [self.numbers[key] for key, _, _ in inputs if key in self.numbers]
        if numbers:  # a stand-in: its results, its mark, then what it was given
            name, inputs = self.calls[numbers[0]], inputs[len(outputs) + 1 :]
            self.graph.fused[name] += 1
        else:
            _, shapes, dtypes = zip(*outputs, strict=True)
            self.graph.nodes.append(Node(name, shapes, dtypes))
        given = [self.layouts.get(key, _rows(shape)) for key, shape, _ in inputs]
        made = _views(name, arguments, given, [shape for _, shape, _ in outputs])
        copied = made is None if name in RESHAPES else sum(_is_copied(name, array) for array in given)
        self.graph.copies += Counter({name: copied})
        self.layouts |= zip([key for key, _, _ in outputs], made or [], strict=False)


def _rows(shape: tuple[int, ...]) -> np.ndarray:
    """An array whose rows lie together. It stands for another one's strides: nothing is written to it."""
    return np.empty(shape, np.int8)


def _views(
    name: str, arguments: list[Any], given: list[np.ndarray], shapes: list[tuple[int, ...]]
) -> list[np.ndarray] | None:
    """The results of an operation that looks at its first input in another way, None for any other: NumPy's rules for
    what needs no copy are MLX's.
    """
    array = given[0] if given else None
    match name:
        case "Slice":
            return [array[tuple(slice(*ends) for ends in zip(*arguments, strict=True))]]
        case "Split":
            return np.split(array, *arguments)
        case "Transpose":
            return [array.transpose(*arguments)]
        case "Broadcast":
            return [np.broadcast_to(array, shapes[0])]
        case "Depends" | "StopGradient":
            return given[: len(shapes)]
        case _ if name in RESHAPES:
            try:
                return [array.reshape(shapes[0], copy=False)]
            except ValueError:
                return None
    return None


# What Metal's kernels ask of an input, from `mlx/backend/metal/`: normalization, softmax, scan, quantized, matmul, rope
# and scaled_dot_product_attention. Elementwise operations, gathers, sorts, sums and updates take any strides.
ROWS = {"contiguous", "dequantize", "rms_norm", "Softmax", "LogSumExp", "Scan"}
MATRIX_ROWS = {"QuantizedMatmul", "GatherQMM"}
MATRIX_EITHER_WAY = {"Matmul", "AddMM", "GatherMM"}


def _is_copied(name: str, array: np.ndarray) -> bool:
    """Whether a kernel copies such an input before it reads it."""
    matrix = array[(0,) * (array.ndim - 2)]
    if name in ROWS:
        return not array.flags.c_contiguous
    if name in MATRIX_ROWS:
        return not matrix.flags.c_contiguous
    if name in MATRIX_EITHER_WAY:
        return 1 not in matrix.strides
    if name == "scaled_dot_product_attention":
        return matrix.strides[-1] != 1
    if name == "rope" and array.ndim > 3:  # one batch row in any strides, or heads and positions swapped
        return not (len(array) == 1 or array.flags.c_contiguous or array.swapaxes(1, 2).flags.c_contiguous)
    return False


@contextmanager
def _fused(targets: list[Target], calls: list[str]) -> Iterator[None]:
    """Each target as a single operation that depends on its inputs and is not in the graph itself."""
    with ExitStack() as stack:
        for home, name in targets:
            stack.enter_context(patch.object(home, name, _stand_in(name, getattr(home, name), calls)))
        yield


def _stand_in(name: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        result = function(*arguments, **options)
        inputs = [value for value in (*arguments, *options.values()) if isinstance(value, mx.array)]
        outputs = result if isinstance(result, tuple) else (result,)
        blank = [mx.zeros(array.shape, array.dtype) for array in outputs]
        opaque = mx.depends(blank, [mx.array(len(calls) - 1, MARK), *inputs])
        return tuple(opaque) if isinstance(result, tuple) else opaque[0]

    return call
