"""The report of a conversion, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .plan import Plan
from .reading.names import group_of

WORST = 5  # modules that the report names


@dataclass(frozen=True)
class ConversionReport:
    """A finished conversion. `shards` holds the `sha256` of every weight file and the `errors` of the modules in it;
    `resumed` counts the files that an earlier, interrupted run had already finished.
    """

    out: Path
    plan: Plan
    shards: Mapping[str, Mapping[str, Any]]
    seconds: float
    resumed: int = 0

    @property
    def files(self) -> dict[str, str]:
        """The SHA-256 of every weight file."""
        return {name: self.shards[name]["sha256"] for name in self.plan.shard_names}

    @cached_property
    def errors(self) -> dict[str, float]:
        """Norm of the error by norm of the weights, of every module quantized here, measured on a part of its rows."""
        return {path: error for name in self.plan.shard_names for path, error in self.shards[name]["errors"].items()}

    @property
    def group_errors(self) -> dict[str, float]:
        """The mean of `errors` per group."""
        groups: dict[str, list[float]] = {}
        for path, error in self.errors.items():
            groups.setdefault(group_of(path), []).append(error)
        return {group: float(f"{sum(errors) / len(errors):.4g}") for group, errors in groups.items()}

    @property
    def worst(self) -> list[tuple[str, float]]:
        return sorted(self.errors.items(), key=lambda module: (-module[1], module[0]))[:WORST]

    def to_dict(self) -> dict[str, Any]:
        """The content of conversion.json: nothing that differs between two runs on the same source."""
        plan = self.plan
        errors, bits = self.group_errors, plan.group_bits
        return {
            "source": plan.source,
            "recipe": plan.scheme.recipe if plan.default_quantization else None,
            "dtype": plan.dtype,
            "tensors": len(plan.tensors),
            "bytes": plan.total_bytes,
            "groups": {
                group: {"bits": bits[group], "bytes": size, "relative_error": errors.get(group)}
                for group, size in plan.group_bytes.items()
            },
            "worst": dict(self.worst),
            "unquantized": list(plan.unquantized),
            "sha256": self.files,
        }

    def render(self) -> str:
        """The report as a person reads it."""
        lines = [self.plan.render(self.group_errors)]
        if self.worst:
            listed = ", ".join(f"{path} {error:.1%}" for path, error in self.worst)
            lines.append(f"Worst         {listed}")
        finished = f" ({self.resumed} of {len(self.shards)} files from before)" if self.resumed else ""
        return "\n".join([*lines, "", f"Written to {self.out} in {self.seconds:.0f} s{finished}."])

    def evidence(self) -> str:
        """The report as the model card has it, in Markdown."""
        errors, bits = self.group_errors, self.plan.group_bits
        rows = [
            f"| {group} | {bits[group]} | {size:,} | {f'{errors[group]:.2%}' if group in errors else ''} |"
            for group, size in self.plan.group_bytes.items()
        ]
        return "\n".join(["| group | stored as | bytes | relative error |", "|---|---|---:|---:|", *rows])
