"""The verb `mlx-dg check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import PromptError
from ..paths import user_path
from .common import named_model


def check(
    directory: Annotated[str, typer.Argument(metavar="DIRECTORY", help="A converted checkpoint, or its name.")],
) -> None:
    """Read every tensor, compare hashes, try the tokenizer and denoise a canvas; exit 0 or say what is wrong."""
    from ..convert import check_checkpoint

    place = user_path(named_model(directory))
    if place.is_file():
        raise PromptError(f"{directory} is a file; give the checkpoint's directory, {_parent(place)}.")
    if not place.is_dir():
        raise PromptError(f"There is no directory {directory}; check the path, or see `mlx-dg models` for names.")
    problems = check_checkpoint(place, tell=lambda name: typer.echo(f"checking {name}", err=True))
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{place} is whole.")


def _parent(file: Path) -> str:
    parent = str(file.parent)
    return "which is this one (.)" if parent == "." else parent
