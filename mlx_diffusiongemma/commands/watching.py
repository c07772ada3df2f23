"""What `infill` and `edit` share: which lines of a text are meant, and how the work on them is watched."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PromptError

if TYPE_CHECKING:
    from ..events import Event, Result
    from ..options import GenerationOptions

Heat = Annotated[bool, typer.Option("--heat", help="Colour drafted tokens by their entropy.")]
Trace = Annotated[Path | None, typer.Option("--trace", help="Record every step in this file (see replay).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON event a line instead.")]


def line_span(text: str, lines: str, *, may_be_empty: bool = False) -> tuple[int, int]:
    """The characters of the lines named as in 10:20, 10: (to the end), :20 or 10, without the last one's end.

    Raises PromptError where they are no lines of the text, or hold nothing and `may_be_empty` is false.
    """
    found = re.fullmatch(r"(\d*)(:?)(\d*)", lines, re.ASCII)
    if not found or not (found[1] or found[3]):
        raise PromptError(f"--lines is {lines!r}; give the first and the last line as in 10:20, 10: or :20.")
    starts = [0, *(place.end() for place in re.finditer("\n", text))]
    count = len(starts) - (starts[-1] == len(text))
    first = int(found[1] or 1)
    last = int(found[3] or (count if found[2] else first))
    if not 1 <= first <= last <= count:
        raise PromptError(f"--lines {lines} does not lie in the text, which has {count} lines; give some of those.")
    stop = starts[last] - 1 if last < len(starts) else len(text)
    if text[starts[first - 1] : stop].endswith("\r"):
        stop -= 1
    if stop == starts[first - 1] and not may_be_empty:
        raise PromptError(f"--lines {lines} has nothing to edit; give lines that are not empty.")
    return starts[first - 1], stop


def check_watching(as_json: bool, live: bool | None, heat: bool) -> None:
    """Raises a usage error where one of these options leaves nothing for another to do."""
    if as_json and (heat or live):
        raise typer.BadParameter("--json prints events and draws nothing; leave out --canvas and --heat")
    if heat and live is False:
        raise typer.BadParameter("--heat colours the canvas, which --no-canvas leaves out")


@contextmanager
def watched(
    *,
    live: bool | None,
    heat: bool,
    trace: Path | None,
    as_json: bool,
    options: GenerationOptions,
    title: str,
    passing: bool,
) -> Iterator[Callable[[Event], object]]:
    """What to call with every event: it is recorded in `trace`, under `title`, and printed or drawn (see `View`)."""
    from ..display.terminal import View
    from ..display.trace import TraceWriter, event_json

    with ExitStack() as stack:
        takers: list[Callable[[Event], object]] = []
        if trace:
            takers.append(stack.enter_context(TraceWriter(trace, title=title)).write)
        if as_json:
            takers.append(lambda event: typer.echo(event_json(event)))
        else:
            takers.append(stack.enter_context(View(live=live, heat=heat, options=options, passing=passing)))

        def take(event: Event) -> None:
            for taker in takers:
                taker(event)

        yield take


def say_cost(result: Result) -> None:
    """What the request cost, on stderr."""
    from ..display.terminal import statistics_line

    sys.stdout.flush()  # on a terminal, the answer comes first
    typer.echo(statistics_line(result.stats), err=True)
