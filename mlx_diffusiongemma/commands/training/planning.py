"""The memory that a training run needs, from shapes alone: `mlx-dg train --plan`."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from ...benchmark.measuring import read_shapes
from ...convert.plan import fitting_mac
from ...training.memory import training_memory
from ..common import named_model
from .running import longest, read_data
from .settings import Settings


def print_plan(settings: Settings) -> None:
    """Print what a run needs, as it is asked for and with the other choice of `grad_checkpoint`: for the examples in
    the data's folder, where one is given, else for the longest that `max_seq_length` allows. Raises CheckpointError and
    TrainingError.
    """
    checkpoint = read_shapes(named_model(settings.model))
    canvas, options = checkpoint.config.canvas_length, settings.options
    tokens = options.max_seq_length + canvas - 1
    if settings.data is not None:
        tokens = longest(read_data(settings, checkpoint), canvas)
    other = replace(options, grad_checkpoint=not options.grad_checkpoint)
    plans = {_name(each.grad_checkpoint): training_memory(checkpoint, each, tokens) for each in (options, other)}
    table = Table(title=f"Memory to train on {options.batch_size} × {tokens:,} tokens, GB", title_justify="left")
    table.add_column("part")
    for name in plans:
        table.add_column(name, justify="right")
    for part in ("weights", "optimizer", "kept", "step"):
        table.add_row(PARTS[part], *(f"{vars(plan)[part] / 1e9:.2f}" for plan in plans.values()))
    table.add_section()
    table.add_row("in all, about", *(f"{plan.total / 1e9:.2f}" for plan in plans.values()))
    console = Console()
    console.print(table)
    for name, plan in plans.items():
        console.print(f"{name}: {fitting_mac(plan.total)}.", soft_wrap=True)


PARTS = {
    "weights": "weights, trained ones too",
    "optimizer": "gradients and moments",
    "kept": "kept for the gradient",
    "step": "the largest step",
}


def _name(again: bool) -> str:
    return "--grad-checkpoint" if again else "plain"
