"""DiffusionGemma on Apple silicon, in pure MLX.

Everything public is imported on first use, so that `import mlx_diffusiongemma` costs nothing and stays silent.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .canvas import Canvas
    from .config import GenerationOptions, ModelConfig, Quantization
    from .errors import CanvasError, CheckpointError, DiffusionGemmaError, PromptError
    from .events import Commit, Done, Draft, Event, Prefill, Reply, Result, Stats, ToolCall
    from .generation import collect, generate, generate_batch, stream
    from .loading import load
    from .processor import Processor, Prompt
    from .session import ChatSession

_HOMES = {
    "canvas": ("Canvas",),
    "config": ("GenerationOptions", "ModelConfig", "Quantization"),
    "errors": ("CanvasError", "CheckpointError", "DiffusionGemmaError", "PromptError"),
    "events": ("Commit", "Done", "Draft", "Event", "Prefill", "Reply", "Result", "Stats", "ToolCall"),
    "generation": ("collect", "generate", "generate_batch", "stream"),
    "loading": ("load",),
    "processor": ("Processor", "Prompt"),
    "session": ("ChatSession",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
