"""The verb `mlx-dg replay`."""

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
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no such picture.")] = False,
    live: LiveCanvas = None,
) -> None:
    """Play a recorded generation again, or draw it."""
    from ..display.pictures import GIF, SVG, animated_gif, animated_svg, entropy_svg, write_svg
    from ..display.trace import read_trace
    from ..display.trace import replay as play_trace
    from ..files import check_place

    pictures = [(path, kind) for path, kind in ((svg, SVG), (entropy, SVG), (gif, GIF)) if path]
    if not pictures:
        play_trace(trace, speed, live=live, heat=heat)
        end_line()
        return
    if len({path.resolve() for path, _ in pictures}) < len(pictures):
        raise typer.BadParameter("give every picture a path of its own")
    for path, kind in pictures:  # before the first is drawn
        check_place(path, kind, force=force, inputs=[trace])
    steps = read_trace(trace)
    if svg:
        write_svg(animated_svg(steps), svg, force=force, inputs=[trace])
    if entropy:
        write_svg(entropy_svg(steps), entropy, force=force, inputs=[trace])
    if gif:
        animated_gif(steps, gif, force=force, inputs=[trace])
    for path, _ in pictures:
        typer.echo(path)
