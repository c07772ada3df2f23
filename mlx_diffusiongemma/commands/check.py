"""The verb `mlx-dg check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(directory: Annotated[Path, typer.Argument(help="A converted checkpoint.")]) -> None:
    """Read every tensor, compare hashes, try the tokenizer and denoise a canvas; exit 0 or say what is wrong."""
    from ..convert import check_checkpoint

    problems = check_checkpoint(directory, tell=lambda name: typer.echo(f"checking {name}", err=True))
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{directory} is whole.")
