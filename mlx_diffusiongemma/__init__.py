"""DiffusionGemma on Apple silicon, in pure MLX.

Everything public is imported on first use, so that `import mlx_diffusiongemma` costs nothing and stays silent.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .canvas import Canvas
    from .choosing import choose
    from .config import GenerationOptions, ModelConfig, Quantization
    from .editing import Edited, edit
    from .errors import (
        CanvasError,
        CheckpointError,
        DiffusionGemmaError,
        MemoryWarning,
        MissingBackendError,
        PromptError,
    )
    from .events import Commit, Done, Draft, Event, Prefill, Reply, Result, Stats, ToolCall
    from .filling import Choice, Digits, Form, Text, fill
    from .gap_filling import Attempt
    from .generation import collect, generate, generate_batch, stream
    from .infilling import Hole, Infilled, infill
    from .loading import load
    from .modes import MODES
    from .processor import Processor, Prompt
    from .session import ChatSession

_HOMES = {
    "canvas": ("Canvas",),
    "choosing": ("choose",),
    "config": ("GenerationOptions", "ModelConfig", "Quantization"),
    "editing": ("Edited", "edit"),
    "errors": (
        "CanvasError",
        "CheckpointError",
        "DiffusionGemmaError",
        "MemoryWarning",
        "MissingBackendError",
        "PromptError",
    ),
    "events": ("Commit", "Done", "Draft", "Event", "Prefill", "Reply", "Result", "Stats", "ToolCall"),
    "filling": ("Choice", "Digits", "Form", "Text", "fill"),
    "gap_filling": ("Attempt",),
    "generation": ("collect", "generate", "generate_batch", "stream"),
    "infilling": ("Hole", "Infilled", "infill"),
    "loading": ("load",),
    "modes": ("MODES",),
    "processor": ("Processor", "Prompt"),
    "session": ("ChatSession",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_HOME_OF[name]}", __name__)
    except ImportError as error:
        # On Linux, MLX is an extra, and its package without a backend cannot load its library.
        if (error.name or "").split(".")[0] == "mlx" or "libmlx" in str(error):
            from .errors import MissingBackendError

            raise MissingBackendError(
                "MLX is not installed for this machine; run: pip install 'mlx-diffusiongemma[cpu]' "
                "(or [cuda] for an NVIDIA GPU)."
            ) from None
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
