"""Things that several verbs share: options, and finding the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor

OFFICIAL = "google/diffusiongemma-26B-A4B-it"
MUCH = 10**9  # bytes of a download that is asked about first
READY_MADE = "mlx-community/diffusiongemma-26B-A4B-it-4bit"

Model = Annotated[
    str | None,
    typer.Option("--model", metavar="PATH|REPO", help="A converted checkpoint; else the one last converted here."),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Most denoising steps per canvas [the checkpoint's].")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", help="Most tokens to generate.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes a reply repeatable.")]
LiveCanvas = Annotated[bool | None, typer.Option("--canvas/--no-canvas", help="Draw the canvas while it denoises.")]


def end_line() -> None:
    """A piped answer ends with a line break too; a terminal's has one already."""
    if not sys.stdout.isatty():
        typer.echo()


def load_model(name: str | None) -> tuple[DiffusionGemma, Processor]:
    import warnings

    from .. import load
    from ..checkpoints.hub import CONVERTED
    from ..errors import MemoryWarning

    name = name or default_model()
    announce_download(name, None, CONVERTED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MemoryWarning)
        loaded = load(name)
    for warning in caught:
        typer.echo(f"mlx-dg: {warning.message}", err=True)
    return loaded


def announce_download(
    source: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    yes: bool = False,
    beside: Mapping[Path, int] | None = None,
    kept: bool = True,
) -> None:
    """Say how much of a repository is going to be downloaded, if anything, and at a terminal ask whether many GB are.

    yes: do not ask. beside: bytes that will be written elsewhere, by directory. kept: whether the whole download will
    be on the disk at once. Raises CheckpointError, also where the disk has no room for it.
    """
    from ..checkpoints.hub import bytes_to_download, check_room

    count = bytes_to_download(source, revision, patterns)
    if not count:
        return
    size = f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    typer.echo(f"To download: up to {size} of {source}", err=True)
    if kept:
        check_room(count, beside or {})
    asked = count >= MUCH and not yes and sys.stdin.isatty() and sys.stderr.isatty()
    if asked and not typer.confirm("Download it?", default=True, err=True):
        typer.echo("mlx-dg: nothing was downloaded.", err=True)
        raise typer.Exit(1)


def default_model() -> str:
    """The checkpoint that was last converted in this directory, else the ready-made one."""
    from ..convert.writing.hashes import REPORT

    converted = list(Path().glob(f"*/{REPORT}"))
    if converted:
        newest = max(converted, key=lambda report: report.stat().st_mtime).parent
        typer.echo(f"Using {newest}", err=True)
        return str(newest)
    typer.echo(f"Using {READY_MADE}, which is downloaded once", err=True)
    return READY_MADE
