"""Things that several verbs share: options, and finding the model."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from ..events import Done, Event, Result
    from ..model.diffusion_gemma import DiffusionGemma
    from ..options import GenerationOptions
    from ..processing.processor import Processor

OFFICIAL = "google/diffusiongemma-26B-A4B-it"
MUCH = 10**9  # bytes of a download that is asked about first
READY_MADE = "mlx-community/diffusiongemma-26B-A4B-it-4bit"


class Verb(TyperCommand):
    """A verb whose help names its arguments without their types in Python."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                vars(parameter)["display_type_rich"] = lambda ctx: None


def whole(least: int, most: int | None = None) -> Callable[[object], int]:
    """Make what reads a whole number of at least `least`, and at most `most`, from the command line; typer's own says
    what is wrong in words of Python.
    """

    def read(given: object) -> int:
        try:
            number = int(str(given))
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise typer.BadParameter(f"{given} is not a whole number {limits}.")
        return number

    return read


def number(least: float, most: float | None = None, above: bool = False) -> Callable[[object], float]:
    """Make what reads a number of at least `least`, and at most `most`. above: it must be more than `least`."""

    def read(given: object) -> float:
        try:
            value = float(str(given))
        except ValueError:
            value = math.nan
        enough = value > least if above else value >= least
        if not (enough and math.isfinite(value) and (most is None or value <= most)):
            limits = f"above {least:g}" if above else f"of at least {least:g}"
            raise typer.BadParameter(
                f"{given} is not a number {limits if most is None else f'from {least:g} to {most:g}'}."
            )
        return value

    return read


def one_of(*numbers: int) -> Callable[[object], int]:
    """Make what reads one of these whole numbers."""

    def read(given: object) -> int:
        if str(given).strip() not in map(str, numbers):
            raise typer.BadParameter(f"{given} is none of {', '.join(map(str, numbers))}.")
        return int(str(given))

    return read


Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="A path, a hub repository or a name that the verb models lists [the last used]."
    ),
]
AdapterPath = Annotated[
    str | None,
    typer.Option("--adapter", "--adapter-path", metavar="DIR", help="What `mlx-dg train` wrote, or a PEFT adapter."),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", parser=whole(1), help="Most denoising steps per canvas [the checkpoint's]."),
]
Milliseconds = Annotated[
    float | None,
    typer.Option(
        "--milliseconds", metavar="N", parser=number(0, above=True), help="Keep the best so far after this time."
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-m", metavar="N", parser=whole(1), help="Most tokens to generate.")
]
Mode = Annotated[
    str, typer.Option("--mode", metavar="MODE", help="reference, fast or turbo; other options win over it.")
]
EntropyBound = Annotated[
    float | None,
    typer.Option("--entropy-bound", metavar="X", parser=number(0), help="Nats accepted per step [the checkpoint's]."),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        "--confidence", metavar="X", parser=number(0), help="Mean entropy that ends a canvas, nats [the checkpoint's]."
    ),
]
CanvasLength = Annotated[
    int | None,
    typer.Option("--canvas-length", metavar="N", parser=whole(1), help="Tokens per canvas [the checkpoint's]."),
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends the reply; may be repeated.")
]
Tools = Annotated[
    Path | None, typer.Option("--tools", metavar="FILE.py", help="Typed functions that it may ask you to run.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", parser=whole(0, 2**64 - 1), help="Makes a reply repeatable."),
]
Continue = Annotated[bool, typer.Option("-c", "--continue", help="Go on with the last conversation (see logs).")]
System = Annotated[
    str | None, typer.Option("--system", "--system-prompt", metavar="TEXT", help="Instructions for the model.")
]
Thinking = Annotated[bool, typer.Option("--thinking", help="Let the model think first.")]
LiveCanvas = Annotated[bool | None, typer.Option("--canvas/--no-canvas", help="Draw the canvas while it denoises.")]
Heat = Annotated[bool, typer.Option("--heat", help="Colour drafted tokens by their entropy.")]
Trace = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Record every step in this file (see replay).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON event a line instead.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Download without asking.")]


def chosen_mode(name: str) -> GenerationOptions:
    """The settings that go by `name`. Raises typer.BadParameter where none do."""
    from .. import MODES

    if name not in MODES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(MODES)}.", param_hint="'--mode'")
    return MODES[name]


def end_line() -> None:
    """A piped answer ends with a line break too; a terminal's has one already."""
    if not sys.stdout.isatty():
        typer.echo()


def load_model(name: str | None, *, yes: bool = False, adapter: str | None = None) -> tuple[DiffusionGemma, Processor]:
    """Load the model that `--model` names, or the one to use without it, and remember it. Raises CheckpointError.

    yes: download what is missing without asking. adapter: see `load`.
    """
    return load_source(announced_model(name, yes=yes), adapter)


def announced_model(name: str | None, *, yes: bool = False) -> str:
    """Find what `--model` names, or what is used without it, and agree on its download. Raises CheckpointError."""
    from ..checkpoints.hub import CONVERTED

    source = named_model(name)
    announce_download(source, None, CONVERTED, yes=yes)
    return source


def load_source(source: str, adapter: str | None = None, *, fuse: bool = True) -> tuple[DiffusionGemma, Processor]:
    """Load the model in a directory or repository (see `load`), and remember it. Raises CheckpointError and
    AdapterError.
    """
    import warnings

    from .. import load
    from ..checkpoints.remembered import remember
    from ..errors import MemoryWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MemoryWarning)
        loaded = load(source, fuse=fuse, adapter=adapter)
    for warning in caught:
        notice(str(warning.message))
    remember(source, notice)
    return loaded


def named_model(name: str | None) -> str:
    """The directory or repository that `--model` names: a path, a name that `mlx-dg models` lists, or a repository.
    Raises CheckpointError.
    """
    from ..checkpoints.remembered import source_of
    from ..errors import CheckpointError

    if name is None:
        return default_model()
    if not name:
        raise CheckpointError("--model is empty; name a model, or leave it out for the last one used.")
    return source_of(name)


def say(text: str) -> None:
    """Tell the user something that is no part of an answer; a terminal gets it broken between words."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        wrapper = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
        lines = text.split("\n")
        text = "\n".join(line if len(line) <= columns else wrapper.fill(line) for line in lines)
    typer.echo(text, err=True)


def notice(sentence: str) -> None:
    """Tell the user something in the name of the command."""
    say(f"mlx-dg: {sentence}")


def announce_download(
    source: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    yes: bool = False,
    beside: Mapping[Path, int] | None = None,
    kept: bool = True,
) -> None:
    """Say how much of a repository is going to be downloaded, if anything, and at a terminal ask whether many GB are.

    yes: do not ask. beside: bytes that will be written elsewhere, by directory. kept: whether the whole download will
    be on the disk at once. Raises CheckpointError, also where the disk has no room for it.
    """
    from ..checkpoints.hub import bytes_to_download, check_room

    count = bytes_to_download(source, revision, patterns)
    if not count:
        return
    size = f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    say(f"To download: up to {size} of {source}")
    if kept:
        check_room(count, beside or {})
    asked = count >= MUCH and not yes and sys.stdin.isatty() and sys.stderr.isatty()
    if asked and not typer.confirm("Download it?", default=True, err=True):
        notice("nothing was downloaded.")
        raise typer.Exit(1)


def default_model() -> str:
    """The model that was used or converted last, else what was converted in this directory, else the ready-made one."""
    from ..checkpoints.remembered import last_used, remembered
    from ..convert.writing.hashes import REPORT

    remembered(notice)  # a damaged list is said to be one
    model = last_used()
    if model:
        say(f"Using {model.name} ({model.source})")
        return model.source
    converted = list(Path().glob(f"*/{REPORT}"))
    if converted:
        newest = max(converted, key=lambda report: report.stat().st_mtime).parent
        say(f"Using {newest}")
        return str(newest)
    say(f"Using {READY_MADE}, which is downloaded once")
    return READY_MADE


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
    force: bool,
    as_json: bool,
    options: GenerationOptions,
    title: str,
    passing: bool,
) -> Iterator[Callable[[Event], object]]:
    """Make what to call with every event: it is recorded in `trace`, under `title`, and printed or drawn (see `View`).

    force: replace a file that is no trace, too.
    """
    from ..display.terminal import View
    from ..display.trace import TraceWriter, event_json

    with ExitStack() as stack:
        takers: list[Callable[[Event], object]] = []
        if trace:
            takers.append(stack.enter_context(TraceWriter(trace, title=title, force=force)).write)
        if as_json:
            takers.append(lambda event: typer.echo(event_json(event)))
        else:
            takers.append(stack.enter_context(View(live=live, heat=heat, options=options, passing=passing)))

        def take(event: Event) -> None:
            for taker in takers:
                taker(event)

        yield take


def say_cost(result: Result | Done) -> None:
    """Say what the request cost, on stderr."""
    from ..display.terminal import statistics_line

    sys.stdout.flush()  # on a terminal, the answer comes first
    typer.echo(statistics_line(result.stats), err=True)
