"""The verb `mlx-dg logs`: conversations that are kept."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import PromptError
from ..common import Verb, say, whole
from .conversations import MOST, MOST_BYTES, VARIABLE, directory, find, is_kept, kept, read, set_kept
from .shown import show_message

if TYPE_CHECKING:
    from pathlib import Path

logs = typer.Typer(
    help=(
        "List the conversations of `generate` and `chat` that are kept on this machine, the last one first. "
        f"Each is a JSON file that only you may read; at most {MOST:,}, and {MOST_BYTES // 10**6} MB, are kept, and "
        f"pictures as their paths. `mlx-dg logs off`, or {VARIABLE}=off in the environment, keeps nothing."
    ),
    rich_markup_mode=None,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SETTINGS = {"help_option_names": ["-h", "--help"]}
Name = Annotated[str, typer.Argument(metavar="[ID]", help="A conversation, or how its ID begins; else the last one.")]


@logs.callback()
def _list(
    context: typer.Context,
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", parser=whole(1), help="How many to list.")] = 20,
) -> None:
    if context.invoked_subcommand:
        return
    paths = kept()
    rows = [_row(path) for path in paths[:count]]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        typer.echo(_fitting(row, width))
    where = f"{len(rows)} of {len(paths)} conversations, in {directory()}."
    off = "" if is_kept() else " None is kept at present: see `mlx-dg logs on`."
    say(f"{where}{off}")


@logs.command(cls=Verb, context_settings=SETTINGS, short_help="Print a conversation.")
def show(
    name: Name = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print its file instead.")] = False,
) -> None:
    """Print a conversation."""
    path = find(name)
    conversation = read(path)
    if as_json:
        typer.echo(path.read_text(encoding="utf-8"), nl=False)
        return
    for message in conversation.messages:
        show_message(message, err=False)


@logs.command(cls=Verb, context_settings=SETTINGS, short_help="Delete conversations.")
def remove(
    names: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Conversations.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are kept.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete conversations, after asking."""
    if everything == bool(names):
        raise typer.BadParameter("give the IDs of conversations, or --all.", param_hint="'ID'")
    paths = kept() if everything else list(dict.fromkeys(find(_named(name)) for name in names or ()))
    count = f"{len(paths)} conversation{'s' * (len(paths) != 1)}"
    if paths and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("give --yes where nobody can be asked.", param_hint="'--yes'")
        if not typer.confirm(f"Delete {count}?", err=True):
            say("Nothing is deleted.")
            return
    for path in paths:
        path.unlink(missing_ok=True)
    say(f"Deleted {count}.")


@logs.command(cls=Verb, context_settings=SETTINGS, short_help="Print where conversations are kept.")
def path() -> None:
    """Print the directory in which conversations are kept."""
    typer.echo(directory())


@logs.command(cls=Verb, context_settings=SETTINGS, short_help="Keep conversations from now on.")
def on() -> None:
    """Keep conversations from now on."""
    set_kept(True)
    forbidden = "" if is_kept() else f" But {VARIABLE} is off in the environment, so none is."
    say(f"Conversations are kept in {directory()}.{forbidden}")


@logs.command(cls=Verb, context_settings=SETTINGS, short_help="Keep no conversations from now on.")
def off() -> None:
    """Keep no conversations from now on; what is kept stays until `mlx-dg logs remove --all`."""
    set_kept(False)
    say("Conversations are no longer kept; `mlx-dg logs remove --all` deletes those that were.")


def _named(name: str) -> str:
    """A name that was given, which to delete something cannot be left empty. Raises typer.BadParameter."""
    if not name:
        raise typer.BadParameter("an ID is empty.", param_hint="'ID'")
    return name


def _row(path: Path) -> tuple[str, str, str, str]:
    """The ID of a conversation, when it was last changed, its turns and its first words."""
    try:
        conversation = read(path)
    except PromptError:
        return path.stem, "", "", "(damaged)"
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    turns = f"{conversation.turns} turn{'s' * (conversation.turns != 1)}"
    return conversation.name, changed, turns, conversation.title


def _fitting(row: tuple[str, str, str, str], width: int | None) -> str:
    """A row of the list; where a terminal is `width` columns wide, its words are cut, and in a narrow one set below."""
    from ...display.cells import break_rows, printable

    name, changed, turns, title = row
    beginning = f"{name}  {changed:16}  {turns:>8}  "
    title = printable(title)
    if width is None:
        return beginning + title
    narrow = width < len(beginning) + 20
    room = width - (2 if narrow else len(beginning))
    rows = break_rows([("", title)], room)
    cut = "" if not rows else rows[0].text if len(rows) == 1 else break_rows([("", title)], room - 1)[0].text + "…"
    return f"{name}\n  {changed} · {turns}\n  {cut}" if narrow else beginning + cut
