"""mlx-dg replay"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import LiveCanvas, end_line, number


def replay(
    trace: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that `mlx-dg generate --trace` or --json wrote.")
    ],
    speed: Annotated[
        float, typer.Option("--speed", metavar="X", parser=number(0, above=True), help="2 plays twice as fast.")
    ] = 1.0,
    heat: Annotated[bool, typer.Option("--heat", help="Colour tokens by their entropy.")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write an animated SVG instead.")] = None,
    gif: Annotated[Path | None, typer.Option("--gif", metavar="FILE", help="Write an animated GIF instead.")] = None,
    entropy: Annotated[
        Path | None,
        typer.Option(
            "--entropy", metavar="FILE", help="Write a picture of entropy by position and step instead (SVG)."
        ),
    ] = None,
    live: LiveCanvas = None,
) -> None:
    """Play a recorded generation again, or draw it."""
    from ..display.pictures import animated_gif, animated_svg, entropy_svg
    from ..display.trace import read_trace
    from ..display.trace import replay as play_trace

    if not (svg or gif or entropy):
        play_trace(trace, speed, live=live, heat=heat)
        end_line()
        return
    steps = read_trace(trace)
    if svg:
        _write(svg, animated_svg(steps))
    if entropy:
        _write(entropy, entropy_svg(steps))
    if gif:
        animated_gif(steps, gif)
        typer.echo(gif)


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    typer.echo(path)
