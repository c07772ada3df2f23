"""The verb `mlx-dg infill`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PromptError
from ..files import check_place, write_file
from .common import (
    AdapterPath,
    AsJson,
    Heat,
    LiveCanvas,
    Milliseconds,
    Model,
    Seed,
    Steps,
    Trace,
    Yes,
    check_watching,
    load_model,
    say,
    say_cost,
    watched,
    whole,
)
from .text_files import TEXT, check_replaceable, line_span, read_text, replace_text, write_out

if TYPE_CHECKING:
    from .. import Hole

MARK = "<FILL>"


def infill(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A UTF-8 text with holes; - reads stdin.")],
    hole: Annotated[
        str | None, typer.Option("--hole", metavar="TEXT", help=f"What marks a hole in the text; else {MARK}.")
    ] = None,
    lines: Annotated[
        str | None,
        typer.Option("--lines", metavar="FIRST:LAST", help="These lines, from 1, are the hole: 10:20, 10:, :20 or 10."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", parser=whole(1), help="Most tokens that a hole takes.")
    ] = 32,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", metavar="TEXT", help="Ask for it in chat; else the text is continued as it is."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Fill each hole with that many tokens, not fewer.")] = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End a hole before this text; again for more.")
    ] = None,
    alternatives: Annotated[
        int | None,
        typer.Option(
            "--alternatives", metavar="N", parser=whole(1, 8), help="Denoise N fillings; the others go to stderr."
        ),
    ] = None,
    milliseconds: Milliseconds = None,
    write: Annotated[bool, typer.Option("--write", help="Replace FILE; else the text is printed.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the text to this file instead.")
    ] = None,
    model: Model = None,
    adapter: AdapterPath = None,
    steps: Steps = None,
    seed: Seed = None,
    live: LiveCanvas = None,
    heat: Heat = False,
    trace: Trace = None,
    force: Annotated[bool, typer.Option("--force", help="Let -o and --trace replace files of another kind.")] = False,
    as_json: AsJson = False,
    yes: Yes = False,
) -> None:
    """Fill the holes in a text and print it."""
    from .. import GenerationOptions, Hole
    from .. import infill as fill_holes

    check_watching(as_json, live, heat)
    if write and (file == "-" or out):
        other = "standard input is no file; use -o FILE" if file == "-" else "-o names another file; give one of them"
        raise typer.BadParameter(f"--write replaces FILE, and {other}")
    if lines is not None and hole is not None:
        raise typer.BadParameter("--hole marks the holes and --lines is one; give one of them")
    if instruction is not None and not instruction.strip():
        raise typer.BadParameter("--instruction is empty; say what is wanted, or leave it out to continue the text")
    if force and not (out or trace):
        raise typer.BadParameter("--force is about the files of -o and --trace, which are not given.")
    if out and trace and out.resolve() == trace.resolve():
        raise typer.BadParameter("-o and --trace name one file; give each a path of its own")
    inputs = [] if file == "-" else [file]
    if write:
        check_replaceable(file)
    if out:
        check_place(out, TEXT, force=force, inputs=inputs)
    text = read_text(file)
    parts = _parts(text, MARK if hole is None else hole, lines, Hole(tokens, stop=stop or []))
    holes = sum(isinstance(part, Hole) for part in parts)
    if exact and (tokens == 1 or (holes == 1 and isinstance(parts[-1], Hole))):
        why = "a hole of one token has one length" if tokens == 1 else "the model ends a hole at the text's end itself"
        raise typer.BadParameter(f"--exact changes nothing here: {why}; leave it out")
    options = GenerationOptions(max_tokens=max(tokens * holes, 1), max_steps=steps, seed=seed)
    loaded, processor = load_model(model, yes=yes, adapter=adapter)
    # A pipe gets the text when it is whole; a terminal, as it becomes certain.
    prints = sys.stdout.isatty() and not (write or out or as_json)
    with watched(
        live=live,
        heat=heat,
        trace=trace,
        force=force,
        as_json=as_json,
        options=options.filled_from(loaded.options),
        title=f"infill {'stdin' if file == '-' else file}",
        passing=not prints,
    ) as watch:
        result = fill_holes(
            loaded,
            processor,
            parts,
            instruction,
            options,
            exact=exact,
            alternatives=alternatives,
            milliseconds=milliseconds,
            on_event=watch,
        )
    if write:
        replace_text(file, text, result.text)
    elif out:
        with write_file(out, TEXT, force=force, inputs=inputs) as whole_file:
            whole_file.write(result.text.encode("utf-8"))
    elif not (prints or as_json):
        write_out(result.text)
    say_cost(result)
    for rival in result.alternatives[1:] if alternatives else []:
        typer.echo(f"Or, {rival.log_likelihood:.1f} nats likely: {' … '.join(rival.holes)}", err=True)
    if result.canvases > 1:
        say(f"The text took {result.canvases} canvases; a hole sees only what follows on its own.")


def _parts(text: str, mark: str, lines: str | None, hole: Hole) -> list[str | Hole]:
    """The text with a hole for every mark, or for the lines. Raises PromptError."""
    if lines is not None:
        start, stop = line_span(text, lines, may_be_empty=True)
        return [part for part in (text[:start], hole, text[stop:]) if part != ""]
    if not mark:
        raise PromptError("--hole is empty; give the text that marks a hole.")
    first, *others = text.split(mark)
    if not others:
        raise PromptError(f"The text has no {mark!r}; put it where something is missing, or name another with --hole.")
    parts: list[str | Hole] = [first]
    for piece in others:
        parts += [hole, piece]
    return [part for part in parts if part != ""]
