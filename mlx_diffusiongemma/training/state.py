"""A run's whole state in one file, so that an interrupted run goes on as if nothing had happened.

Order and draws follow from the seed and the number of the update: beside the weights and the optimizer's moments, there
is little to keep.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import TrainingError
from ..files import WholeFile

FILE = "training.safetensors"
PARAMETER, OPTIMIZER = "parameter:", "optimizer:"


@dataclass(frozen=True)
class Progress:
    """The place where a run is. done: updates. best: the lowest validation loss. stale: validations since then."""

    done: int = 0
    best: float | None = None
    stale: int = 0

    def after(self, loss: float) -> Progress:
        """This progress after a validation."""
        if self.best is None or loss < self.best:
            return replace(self, best=loss, stale=0)
        return replace(self, stale=self.stale + 1)


@dataclass(frozen=True)
class State:
    """All that a run goes on from. parameters and optimizer: arrays by name."""

    progress: Progress
    parameters: dict[str, mx.array]
    optimizer: dict[str, mx.array]


def save_state(directory: Path, state: State, settings: str) -> None:
    """Write the state; settings: what has to be the same when the run goes on. Raises TrainingError."""
    arrays = {PARAMETER + name: array for name, array in state.parameters.items()}
    arrays |= {OPTIMIZER + name: array for name, array in state.optimizer.items()}
    metadata = {"progress": json.dumps(asdict(state.progress)), "settings": settings}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with WholeFile(directory / FILE) as file:
            mx.save_safetensors(file, arrays, metadata)
    except (OSError, RuntimeError) as error:
        raise TrainingError(f"{directory / FILE} cannot be written ({error}); make room and resume.") from None


def read_state(directory: Path, settings: str) -> State:
    """Read the state of a run with these settings. Raises TrainingError."""
    path = directory / FILE
    if not path.is_file():
        raise TrainingError(f"{directory} holds no run to resume; leave --resume out to begin one.")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        mx.eval(arrays)
        progress = Progress(**json.loads(metadata["progress"]))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{path} is damaged; begin the run again without --resume.") from None
    if metadata.get("settings") != settings:
        raise TrainingError(
            f"The run in {directory} had other settings or other data; resume it with the same, or begin in another "
            "folder."
        )
    parts = {
        prefix: {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        for prefix in (PARAMETER, OPTIMIZER)
    }
    return State(progress, parts[PARAMETER], parts[OPTIMIZER])
