"""What a piece of work would launch on a GPU, counted from its graph: nothing is computed.

MLX's fast functions are one kernel each where they are fused and a dozen operations where they fall back, and chains
under `mx.compile` are one kernel on a GPU and left apart on a CPU. To give the same number everywhere, each call of
one of them counts as one, and its insides are left out of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import mlx.core as mx

# Operations that only look at their input in another way, or that are constants of a graph.
NO_KERNEL = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Full",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
    "View",
    "contiguous",  # of rows of a matrix, which lie together already
}
FAST = [
    (mx, "contiguous"),
    (mx, "dequantize"),
    (mx.fast, "rms_norm"),
    (mx.fast, "rope"),
    (mx.fast, "scaled_dot_product_attention"),
]
Target = tuple[object, str]  # where a function lives, and its name there


@dataclass(frozen=True)
class Node:
    """One operation, and what it gives."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]


@dataclass
class Graph:
    """`nodes`: every operation outside the fused ones. `fused`: calls of each of those, by name."""

    nodes: list[Node] = field(default_factory=list)
    fused: Counter[str] = field(default_factory=Counter)

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
    graph = Graph()

    def record(part: dict[str, Any]) -> None:
        if part["type"] == "primitive":
            _, shapes, dtypes = zip(*part["outputs"], strict=True)
            graph.nodes.append(Node(part["name"], shapes, dtypes))

    with _fused([*FAST, *(compiled or [])], graph.fused):
        mx.export_function(record, function, *inputs)
    return graph


@contextmanager
def _fused(targets: list[Target], calls: Counter[str]) -> Iterator[None]:
    """Each target as a single operation that depends on its inputs and is not in the graph itself."""
    with ExitStack() as stack:
        for home, name in targets:
            stack.enter_context(patch.object(home, name, _stand_in(name, getattr(home, name), calls)))
        yield


def _stand_in(name: str, function: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        result = function(*arguments, **options)
        inputs = [value for value in (*arguments, *options.values()) if isinstance(value, mx.array)]
        outputs = result if isinstance(result, tuple) else (result,)
        opaque = tuple(mx.depends(mx.zeros(array.shape, array.dtype), inputs) for array in outputs)
        return opaque if isinstance(result, tuple) else opaque[0]

    return call
