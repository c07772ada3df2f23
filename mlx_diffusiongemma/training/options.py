"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import TrainingError
from ..model.adapters import AdapterConfig

Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adam", "adamw", "muon", "sgd", "adafactor")
# The report's: Adam with these moments, and a little decoupled weight decay.
ADAMW = {"betas": (0.95, 0.99), "weight_decay": 1e-4, "bias_correction": True}
SCHEDULE = ("name", "arguments", "warmup", "warmup_init")


@dataclass(frozen=True)
class TrainingOptions:
    """One run's settings. Names are mlx-lm's where it has them, defaults those of DiffusionGemma's own recipes.

    adapter: what is trained, see `AdapterConfig`.
    iters: updates of the weights, each from the mean gradient of batch_size x grad_accumulation_steps replies.
    batch_size: replies computed at once; canvases are wide already, so that more than one pays for small models only.
    learning_rate: reached after `warmup` updates, then falling along a cosine to `final_rate` of itself.
    lr_schedule: mlx-lm's form of another schedule: {"name", "arguments", "warmup", "warmup_init"}.
    optimizer, optimizer_config: a class of mlx.optimizers and its arguments; None is our own for "adamw".
    clip: the gradient's largest norm.
    max_seq_length: tokens of a prompt and its reply; longer replies are cut.
    mask_prompt: the next-token loss is of the reply's tokens alone.
    grad_checkpoint: keep less for the gradient and compute it again: about a third more time.
    val_batches: validation batches, -1 for all. steps_per_eval, steps_per_report, save_every: in updates.
    patience: validations without a better loss after which training ends; None never ends it so.
    generate: conversations that are also answered at each validation, for a score and the steps per canvas.
    seed: of the fresh adapter, the order of the data and every draw.
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    iters: int = 2000
    batch_size: int = 1
    grad_accumulation_steps: int = 8
    learning_rate: float = 1.5e-4
    warmup: int = 100
    final_rate: float = 0.1
    lr_schedule: Mapping[str, Any] | None = None
    optimizer: Optimizer = "adamw"
    optimizer_config: Mapping[str, Any] | None = None
    clip: float = 1.0
    max_seq_length: int = 2048
    mask_prompt: bool = False
    grad_checkpoint: bool = False
    val_batches: int = 25
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    patience: int | None = None
    generate: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (
            ("iters", 1),
            ("batch_size", 1),
            ("grad_accumulation_steps", 1),
            ("warmup", 0),
            ("max_seq_length", 2),
            ("val_batches", -1),
            ("steps_per_report", 1),
            ("steps_per_eval", 1),
            ("save_every", 1),
            ("generate", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise TrainingError(f"{name} is a whole number from {lowest} on, not {value!r}.")
        for name in ("learning_rate", "final_rate", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise TrainingError(f"{name} is a number above 0, not {value!r}.")
        if self.patience is not None and (isinstance(self.patience, bool) or self.patience < 1):
            raise TrainingError(f"patience is a whole number from 1 on, not {self.patience!r}.")
        if self.optimizer not in OPTIMIZERS:
            raise TrainingError(f"optimizer is one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}.")
        if self.lr_schedule is not None:
            _check_schedule(self.lr_schedule)

    @property
    def update_size(self) -> int:
        """Replies that one update learns from."""
        return self.batch_size * self.grad_accumulation_steps


def _check_schedule(schedule: Mapping[str, Any]) -> None:
    """Raises TrainingError where mlx-lm cannot build this schedule, or would ignore a part of it."""
    from mlx_lm.tuner.utils import build_schedule

    for name in schedule:
        if name not in SCHEDULE:
            raise TrainingError(f"lr_schedule has {', '.join(SCHEDULE)}; leave {name!r} out.")
    try:
        build_schedule(dict(schedule))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise TrainingError(
            f"lr_schedule describes no schedule of mlx.optimizers ({error}); write it as "
            "{name: cosine_decay, arguments: [1.5e-4, 2000, 1.5e-5], warmup: 100}."
        ) from None
