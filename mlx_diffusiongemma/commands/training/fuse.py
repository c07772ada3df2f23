"""The verb `mlx-dg fuse`."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ..common import AdapterPath, Model, Yes, announced_model, notice, say

NOTICEABLE = 0.05  # of the adapter's change: rounding from which on one should know of it


def fuse(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory to write.")],
    model: Model = None,
    adapter: AdapterPath = "adapters",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Keep what the adapter changed unquantized, so that nothing is lost.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Write a checkpoint with an adapter merged into its weights, which needs no adapter any more.

    Quantized weights are quantized again, which rounds small changes away: how much was lost is said at the end. An
    adapter that changes encoder and decoder differently cannot be merged: the two are one set of weights.
    """
    from ...checkpoints.remembered import remember
    from ...convert import fuse_adapter

    source = announced_model(model, yes=yes)
    report = fuse_adapter(source, adapter or "adapters", out, dequantize=dequantize)
    remember(report.out, notice)
    if report.modules:  # and not whole weights
        say(f"{report.modules} linear layers merged; rounding took away {report.lost:.1%} of their change.")
    if report.lost > NOTICEABLE:
        notice("the fused model is not quite what was trained; --adapter keeps all of it, and so does --dequantize.")
    typer.echo(report.out)
    say(f'Next: mlx-dg generate --model {shlex.quote(str(report.out))} "…"')
