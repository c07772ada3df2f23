"""The verb `mlx-dg infill`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import PromptError
from .common import Model, Seed, Steps, load_model, whole
from .text_files import read_text, write_out


def infill(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A UTF-8 text with holes; - reads stdin.")],
    hole: Annotated[str, typer.Option("--hole", metavar="TEXT", help="What marks a hole in the text.")] = "<FILL>",
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", parser=whole(1), help="Most tokens that a hole takes.")
    ] = 32,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", metavar="TEXT", help="Ask for it in chat; else the text is continued as it is."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Try only that many tokens, not fewer.")] = False,
    model: Model = None,
    steps: Steps = None,
    seed: Seed = None,
) -> None:
    """Fill the holes in a text and print it."""
    from .. import GenerationOptions, Hole
    from .. import infill as fill_holes

    if not hole:
        raise PromptError("--hole is empty; give the text that marks a hole.")
    pieces = read_text(file).split(hole)
    if len(pieces) == 1:
        raise PromptError(f"The text has no {hole!r}; put it where something is missing, or name another with --hole.")
    parts: list[str | Hole] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [Hole(tokens), piece]
    options = GenerationOptions(max_steps=steps, seed=seed)
    result = fill_holes(*load_model(model), parts, instruction, options, exact=exact)
    write_out(result.text)
    if result.canvases > 1:
        typer.echo(f"The text took {result.canvases} canvases; a hole sees only what follows on its own.", err=True)
