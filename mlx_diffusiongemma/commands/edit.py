"""The verb `mlx-dg edit`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ..errors import PromptError
from .common import Model, Seed, Steps, load_model, number
from .text_files import check_replaceable, read_text, replace_text, write_out


def edit(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A UTF-8 text file.")],
    instruction: Annotated[str, typer.Argument(metavar="INSTRUCTION", help="What to do with the lines.")],
    lines: Annotated[str, typer.Option("--lines", metavar="FIRST:LAST", help="The lines to rewrite, from 1.")],
    strength: Annotated[
        float,
        typer.Option("--strength", metavar="X", parser=number(0, 1), help="0 keeps the lines, 1 starts from noise."),
    ] = 0.7,
    write: Annotated[bool, typer.Option("--write", help="Replace the file; else only the diff is printed.")] = False,
    model: Model = None,
    steps: Steps = None,
    seed: Seed = None,
) -> None:
    """Rewrite some lines of a file and print the change as a unified diff."""
    from .. import GenerationOptions
    from .. import edit as edit_text
    from ..filling.editing import unified_diff

    if write:
        check_replaceable(file)
    text = read_text(file)
    span = _span(text, lines)
    options = GenerationOptions(max_steps=steps, seed=seed)
    result = edit_text(*load_model(model), text, span, instruction, strength, options)
    write_out(unified_diff(text, result.text, file.lstrip("/")))
    if write and result.text != text:
        replace_text(file, text, result.text)


def _span(text: str, lines: str) -> tuple[int, int]:
    """The characters of the given lines, without the last one's end. Raises PromptError."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", lines)
    if not found:
        raise PromptError(f"--lines is {lines!r}; give the first and the last line as in 10:20.")
    first, last = int(found[1]), int(found[2] or found[1])
    starts = [0, *(place.end() for place in re.finditer("\n", text))]
    count = len(starts) - (starts[-1] == len(text))
    if not 1 <= first <= last <= count:
        raise PromptError(f"Lines {first}:{last} do not lie in the text, which has {count}; give two of those.")
    stop = starts[last] - 1 if last < len(starts) else len(text)
    if text[starts[first - 1] : stop].endswith("\r"):
        stop -= 1
    if stop == starts[first - 1]:
        raise PromptError(f"Lines {first}:{last} are empty; give lines with something to edit.")
    return starts[first - 1], stop
