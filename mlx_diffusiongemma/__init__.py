"""DiffusionGemma on Apple silicon, in pure MLX.

Everything public is imported on first use, so that `import mlx_diffusiongemma` costs nothing and stays silent.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoints.adapter_files import load_adapter
    from .checkpoints.loading import load
    from .config import ModelConfig, Quantization
    from .errors import (
        AdapterError,
        BusyError,
        CanvasError,
        CheckpointError,
        DiffusionGemmaError,
        MemoryWarning,
        MissingBackendError,
        PromptError,
        TrainingError,
    )
    from .events import Commit, Done, Draft, Event, Filled, Prefill, Reply, Result, Stats, ToolCall
    from .filling.choosing import choose
    from .filling.editing import Edited, edit
    from .filling.forms import Choice, Digits, Form, Text, fill
    from .filling.infilling import Alternative, Hole, Infilled, infill
    from .filling.search import Attempt
    from .generation.asynchronous import agenerate, astream
    from .generation.batch import generate_batch
    from .generation.canvas import Canvas
    from .generation.replying import collect, generate, stream
    from .generation.session import ChatSession
    from .model.adapters import Adapter
    from .options import MODES, GenerationOptions
    from .processing.processor import Processor, Prompt

_HOMES = {
    "config": ("ModelConfig", "Quantization"),
    "options": ("MODES", "GenerationOptions"),
    "errors": (
        "AdapterError",
        "BusyError",
        "CanvasError",
        "CheckpointError",
        "DiffusionGemmaError",
        "MemoryWarning",
        "MissingBackendError",
        "PromptError",
        "TrainingError",
    ),
    "events": ("Commit", "Done", "Draft", "Event", "Filled", "Prefill", "Reply", "Result", "Stats", "ToolCall"),
    "processing.processor": ("Processor", "Prompt"),
    "checkpoints.adapter_files": ("load_adapter",),
    "checkpoints.loading": ("load",),
    "model.adapters": ("Adapter",),
    "generation.canvas": ("Canvas",),
    "generation.asynchronous": ("agenerate", "astream"),
    "generation.batch": ("generate_batch",),
    "generation.replying": ("collect", "generate", "stream"),
    "generation.session": ("ChatSession",),
    "filling.choosing": ("choose",),
    "filling.editing": ("Edited", "edit"),
    "filling.forms": ("Choice", "Digits", "Form", "Text", "fill"),
    "filling.infilling": ("Alternative", "Hole", "Infilled", "infill"),
    "filling.search": ("Attempt",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "MODES",
    "Adapter",
    "AdapterError",
    "Alternative",
    "Attempt",
    "BusyError",
    "Canvas",
    "CanvasError",
    "ChatSession",
    "CheckpointError",
    "Choice",
    "Commit",
    "DiffusionGemmaError",
    "Digits",
    "Done",
    "Draft",
    "Edited",
    "Event",
    "Filled",
    "Form",
    "GenerationOptions",
    "Hole",
    "Infilled",
    "MemoryWarning",
    "MissingBackendError",
    "ModelConfig",
    "Prefill",
    "Processor",
    "Prompt",
    "PromptError",
    "Quantization",
    "Reply",
    "Result",
    "Stats",
    "Text",
    "ToolCall",
    "TrainingError",
    "__version__",
    "agenerate",
    "astream",
    "choose",
    "collect",
    "edit",
    "fill",
    "generate",
    "generate_batch",
    "infill",
    "load",
    "load_adapter",
    "stream",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> object:
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
