"""mlx-dg replay"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import LiveCanvas, end_line


def replay(
    trace: Annotated[Path, typer.Argument(help="A file that --trace or --json wrote.")],
    speed: Annotated[float, typer.Option("--speed", help="2 plays twice as fast.")] = 1.0,
    heat: Annotated[bool, typer.Option("--heat", help="Colour tokens by their entropy.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write an animation instead: FILE.svg or FILE.gif.")
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write an animated SVG instead.")] = None,
    gif: Annotated[Path | None, typer.Option("--gif", help="Write an animated GIF instead.")] = None,
    entropy: Annotated[
        Path | None, typer.Option("--entropy", help="Write a picture of entropy by position and step instead (SVG).")
    ] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Name the tokens in the picture of --entropy.")] = False,
    title: Annotated[
        str | None, typer.Option("--title", help="What stands above pictures; else what the trace was asked.")
    ] = None,
    live: LiveCanvas = None,
) -> None:
    """Play a recorded generation again, or draw it."""
    from ..display.pictures import animated_gif, animated_svg, entropy_svg
    from ..display.trace import read_trace
    from ..display.trace import replay as play_trace

    if out:
        kind = out.suffix.lower()
        if kind not in (".svg", ".gif"):
            raise typer.BadParameter("give a path that ends in .svg or .gif", param_hint="--out")
        if svg if kind == ".svg" else gif:
            raise typer.BadParameter(f"--out and --{kind[1:]} both name the animation; give one of them")
        svg, gif = (out, gif) if kind == ".svg" else (svg, out)
    _check_use(svg or gif, entropy, heat=heat, labels=labels, title=title, speed=speed, live=live)
    if not (svg or gif or entropy):
        play_trace(trace, speed, live=live, heat=heat)
        end_line()
        return
    steps = read_trace(trace)
    if svg:
        _write(svg, animated_svg(steps, heat=heat, title=title, speed=speed))
    if entropy:
        _write(entropy, entropy_svg(steps, labels=labels, title=title))
    if gif:
        animated_gif(steps, gif, heat=heat, title=title, speed=speed)
        typer.echo(gif)


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


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    typer.echo(path)
