"""The verb `mlx-dg edit`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import PromptError
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
    number,
    say,
    say_cost,
    watched,
)
from .text_files import check_replaceable, line_span, read_text, replace_text, write_out


def edit(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A UTF-8 text file; - reads stdin.")],
    instruction: Annotated[str, typer.Argument(metavar="INSTRUCTION", help="What to do with the lines.")],
    lines: Annotated[
        list[str] | None,
        typer.Option(
            "--lines",
            metavar="FIRST:LAST",
            help="Lines to rewrite, from 1: 10:20, 10: or 10; again for more [all].",
        ),
    ] = None,
    strength: Annotated[
        float,
        typer.Option("--strength", metavar="X", parser=number(0, 1), help="0 keeps the lines, 1 holds on to none."),
    ] = 0.7,
    milliseconds: Milliseconds = None,
    write: Annotated[
        bool, typer.Option("--write", help="Replace FILE as well; else only the diff is printed.")
    ] = False,
    model: Model = None,
    adapter: AdapterPath = None,
    steps: Steps = None,
    seed: Seed = None,
    live: LiveCanvas = None,
    heat: Heat = False,
    trace: Trace = None,
    force: Annotated[bool, typer.Option("--force", help="Let --trace replace a file that is no trace.")] = False,
    as_json: AsJson = False,
    yes: Yes = False,
) -> None:
    """Rewrite some lines of a file and print the change as a unified diff."""
    from .. import GenerationOptions
    from .. import edit as edit_text
    from ..filling.editing import unified_diff

    check_watching(as_json, live, heat)
    if force and not trace:
        raise typer.BadParameter("--force is about the file of --trace, which is not given.")
    if file == "-" and write:
        raise typer.BadParameter("--write replaces FILE, and standard input is no file; name one, or use the diff")
    if not instruction.strip():
        raise typer.BadParameter("the instruction is empty; say what to do with the lines", param_hint="INSTRUCTION")
    if write:
        check_replaceable(file)
    text = read_text(file)
    spans = [line_span(text, own) for own in lines] if lines else None
    if not text:
        raise PromptError("The text is empty; there is nothing to edit.")
    options = GenerationOptions(max_steps=steps, seed=seed)
    loaded, processor = load_model(model, yes=yes, adapter=adapter)
    with watched(
        live=live,
        heat=heat,
        trace=trace,
        force=force,
        as_json=as_json,
        options=options.filled_from(loaded.options),
        title=instruction,
        passing=True,  # the answer is the diff
    ) as watch:
        result = edit_text(
            loaded, processor, text, spans, instruction, strength, options, milliseconds=milliseconds, on_event=watch
        )
    if not as_json:
        write_out(unified_diff(text, result.text, "stdin" if file == "-" else file.lstrip("/")))
    if write and result.text != text:
        replace_text(file, text, result.text)
    say_cost(result)
    if result.text == text:
        say("The lines came back as they were; raise --strength, or ask for something else.")
