"""The verb `mlx-dg bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .common import AdapterPath, Model, Yes, announce_download, load_model, named_model, notice, whole


def bench(
    model: Model = None,
    adapter: AdapterPath = None,
    steps: Annotated[
        str, typer.Option("--steps", metavar="N,N", help="Fixed amounts of work, comma-separated.")
    ] = "8,16",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", metavar="N", parser=whole(1), help="Most tokens per answer.")
    ] = 512,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="NAME", help="An autoregressive model for mlx-lm to run beside it."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="From shapes alone: the memory, the Macs that fit, and their predicted speed."),
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            parser=whole(1),
            help="Tokens of context for --plan; else 8192, or the most for the model.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    yes: Yes = False,
) -> None:
    """Measure where a denoising step's time goes, how fast replies come, and which decoder is the fastest here."""
    from rich.console import Console

    from ..benchmark.measuring import make_plan, measure_autoregressive, run_benchmark
    from ..benchmark.report import render, render_plan
    from ..checkpoints.hub import is_repository

    if context and not plan:
        raise typer.BadParameter("--context is for --plan; give that too")
    if against and plan:
        raise typer.BadParameter("--against is measured, and --plan measures nothing; leave out one of them")
    if plan:
        needs = make_plan(named_model(model), context)
        if as_json:
            typer.echo(json.dumps(needs.to_dict()))
        else:
            Console().print(render_plan(needs))
        if needs.warning:
            notice(needs.warning)
        return
    counts = _counts(steps)
    rival = None
    if against:
        from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

        model = named_model(model)
        is_repository(model)  # or it is something that only fails once the other has run
        announce_download(against, None, DEFAULT_ALLOW_PATTERNS, yes=yes)
        _log(f"the prompts' answers of {against}")
        rival = measure_autoregressive(against, max_tokens=max_tokens)
    loaded, processor = load_model(model, yes=yes, adapter=adapter)
    report = run_benchmark(loaded, processor, steps=counts, max_tokens=max_tokens, against=rival, log=_log)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        Console().print(render(report))


def _log(message: str) -> None:
    typer.echo(f"measuring: {message}", err=True)


def _counts(steps: str) -> list[int]:
    counts = steps.split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise typer.BadParameter("--steps takes whole numbers, such as 8,16")
    return [int(count) for count in counts]
