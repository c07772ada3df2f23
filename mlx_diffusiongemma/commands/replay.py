"""The verb `mlx-dg replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import LiveCanvas, end_line, number


def replay(
    trace: Annotated[Path, typer.Argument(metavar="FILE", help="A file that --trace or --json wrote.")],
    speed: Annotated[
        float, typer.Option("--speed", metavar="X", parser=number(0, above=True), help="2 plays twice as fast.")
    ] = 1.0,
    heat: Annotated[bool, typer.Option("--heat", help="Colour tokens by their entropy.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="Write an animation instead: FILE.svg or FILE.gif."),
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write an animated SVG instead.")] = None,
    gif: Annotated[Path | None, typer.Option("--gif", metavar="FILE", help="Write an animated GIF instead.")] = None,
    entropy: Annotated[
        Path | None,
        typer.Option(
            "--entropy", metavar="FILE", help="Write a picture of entropy by position and step instead (SVG)."
        ),
    ] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Name the tokens in the picture of --entropy.")] = False,
    title: Annotated[
        str | None,
        typer.Option("--title", metavar="TEXT", help="What stands above pictures; else what the trace was asked."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no such picture.")] = False,
    live: LiveCanvas = None,
) -> None:
    """Play a recorded generation again, or draw it."""
    from ..display.picture_files import GIF, SVG, write_svg
    from ..display.pictures import animated_gif, animated_svg, entropy_svg
    from ..display.trace import read_trace
    from ..display.trace import replay as play_trace
    from ..files import check_place

    if out:
        suffix = out.suffix.lower()
        if suffix not in (".svg", ".gif"):
            raise typer.BadParameter("give a path that ends in .svg or .gif", param_hint="--out")
        if svg if suffix == ".svg" else gif:
            raise typer.BadParameter(f"--out and --{suffix[1:]} both name the animation; give one of them")
        svg, gif = (out, gif) if suffix == ".svg" else (svg, out)
    _check_use(svg or gif, entropy, heat=heat, labels=labels, title=title, speed=speed, live=live)
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
        write_svg(animated_svg(steps, heat=heat, title=title, speed=speed), svg, force=force, inputs=[trace])
    if entropy:
        write_svg(entropy_svg(steps, labels=labels, title=title), entropy, force=force, inputs=[trace])
    if gif:
        animated_gif(steps, gif, heat=heat, title=title, speed=speed, force=force, inputs=[trace])
    for path, _ in pictures:
        typer.echo(path)


def _check_use(
    animation: Path | None,
    entropy: Path | None,
    *,
    heat: bool,
    labels: bool,
    title: str | None,
    speed: float,
    live: bool | None,
) -> None:
    """Raises a usage error where an option has nothing to change."""
    if labels and not entropy:
        raise typer.BadParameter("--labels names the tokens in the picture of --entropy; give that too")
    if title is not None and not (animation or entropy):
        raise typer.BadParameter("--title stands above a picture; give --out or --entropy too")
    if entropy and not animation and (heat or speed != 1):
        raise typer.BadParameter("--heat and --speed are an animation's; leave them out, or give --out too")
    if live is not None and (animation or entropy):
        raise typer.BadParameter("--canvas and --no-canvas are the terminal's; leave them out of a picture")
    if heat and live is False:
        raise typer.BadParameter("--heat colours the canvas, which --no-canvas leaves out")
