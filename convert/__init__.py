"""Published checkpoints become quantized MLX arrays.

Imported on first use, so that reading the recipes' names and sizes costs no import of MLX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .calibration import Calibration, calibrate, check_calibration, read_prompts
    from .check import check_checkpoint
    from .conversion import check_conversion, convert_checkpoint, plan_conversion, plan_tensors
    from .fusing import FuseReport, fuse_adapter
    from .plan import Plan
    from .quantization import RECIPES
    from .report import ConversionReport
    from .upload import check_upload, upload_checkpoint

_HOMES = {
    "calibration": ("Calibration", "calibrate", "check_calibration", "read_prompts"),
    "check": ("check_checkpoint",),
    "conversion": ("check_conversion", "convert_checkpoint", "plan_conversion", "plan_tensors"),
    "fusing": ("FuseReport", "fuse_adapter"),
    "plan": ("Plan",),
    "quantization": ("RECIPES",),
    "report": ("ConversionReport",),
    "upload": ("check_upload", "upload_checkpoint"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "RECIPES",
    "Calibration",
    "ConversionReport",
    "FuseReport",
    "Plan",
    "calibrate",
    "check_calibration",
    "check_checkpoint",
    "check_conversion",
    "check_upload",
    "convert_checkpoint",
    "fuse_adapter",
    "plan_conversion",
    "plan_tensors",
    "read_prompts",
    "upload_checkpoint",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
        return value
