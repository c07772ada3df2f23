"""What a conversion did, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import Plan

REPORT = "conversion.json"


@dataclass(frozen=True)
class ConversionReport:
    """A finished conversion. `files` maps every weight file to its SHA-256; `resumed` counts those an earlier,
    interrupted run had already finished.
    """

    out: Path
    plan: Plan
    files: dict[str, str]
    seconds: float
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What conversion.json holds: nothing that differs between two runs on the same source."""
        plan = self.plan
        return {
            "source": plan.source,
            "recipe": plan.scheme.recipe if plan.default_quantization else None,
            "dtype": plan.dtype,
            "tensors": len(plan.tensors),
            "bytes": plan.total_bytes,
            "group_bytes": plan.group_bytes,
            "unquantized": list(plan.unquantized),
            "sha256": self.files,
        }

    def render(self) -> str:
        """The report as a person reads it."""
        return f"{self.plan.render()}\n\nWritten to {self.out} in {self.seconds:.0f} s."
