"""The verb `mlx-dg demo`."""

from __future__ import annotations

from pathlib import Path

import typer

from .common import LiveCanvas, Seed, end_line

TASKS = ("sort 53142", "reverse canvas", "json name=ada age=36", "solve 42.3/3.24/1.../2.31", "count from 17")


def demo(seed: Seed = 0, live: LiveCanvas = None) -> None:
    """Convert and run the small trained checkpoint that comes with this package; nothing is downloaded."""
    from .. import load, stream
    from ..display.terminal import show, statistics_line

    directory = _demo_checkpoint()
    model, processor = load(directory)
    for task in TASKS:
        typer.secho(f"> {task}", err=True, bold=True)
        done = show(stream(model, processor, task, seed=seed), live=live)
        end_line()
        typer.secho(statistics_line(done.stats), err=True, dim=True)


def _demo_checkpoint() -> Path:
    """The demo checkpoint at 4 bits, converted into the user's cache directory on first use."""
    import platform

    from .. import __version__
    from ..convert import convert_checkpoint

    caches = Path.home() / ("Library/Caches" if platform.system() == "Darwin" else ".cache")
    out = caches / "mlx-diffusiongemma" / f"demo-4bit-{__version__}"
    if not out.exists():
        typer.echo(f"Converting the demo checkpoint to 4 bits in {out}", err=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        convert_checkpoint(Path(__file__).parent.parent / "demo", out, bits=4)
    return out
