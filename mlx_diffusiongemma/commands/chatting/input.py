"""Lines from the user of `mlx-dg chat`: edited at a terminal, read as they are from a pipe."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from ...errors import PromptError
from ...paths import data_directory

# Shows a question and returns the answer. Raises EOFError where there is no more, KeyboardInterrupt at Ctrl-C.
Read = Callable[[str], str]


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def message_reader(
    commands: Sequence[str] = (), take_paths: Sequence[str] = (), settings: Sequence[str] = (), keep: bool = False
) -> Read:
    """Make what reads messages: at a terminal with line editing and a history, where pasted lines stay one message,
    Esc Enter begins a new line, and Tab completes.

    commands: after a slash; take_paths: those of them that a path follows. settings: what may follow /set. keep: the
    history goes on from earlier runs, and is kept for later ones.
    """
    if not at_terminal():
        return _read_line
    place = _history_file() if keep else None
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return _plain_reader(place)
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.shortcuts import CompleteStyle

    from .completion import ChatCompleter

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return PromptSession(
        key_bindings=keys,
        history=FileHistory(str(place)) if place else InMemoryHistory(),
        completer=ChatCompleter(commands, take_paths, settings),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # which needs no rows below the line, where a menu takes eight
        enable_suspend=True,
    ).prompt


def _history_file() -> Path | None:
    """Where messages are kept for the next chat, for this user alone; None where they cannot be."""
    try:
        place = data_directory() / "chat-history"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch(mode=0o600)
        with place.open("r+b"):
            return place
    except (OSError, PromptError):
        return None


def _plain_reader(place: Path | None) -> Read:
    """Make what reads messages with Python's own line editing. place: where its history is kept."""
    ask = answer_reader()
    try:
        import readline
    except ImportError:  # Windows has none
        return ask
    if place:
        with suppress(OSError):  # a file that is none, or of another kind of readline
            readline.read_history_file(place)

    def read(question: str) -> str:
        line = ask(question)
        if line.strip():
            readline.add_history(line)
            if place:
                with suppress(OSError):
                    readline.write_history_file(place)
        return line

    return read


def answer_reader() -> Read:
    """Make what reads short answers, which no history keeps where `message_reader` has one."""
    if not at_terminal():
        return _read_line
    with suppress(ImportError):  # Windows has none
        import readline  # which gives `input` line editing

        readline.set_auto_history(False)
    return _input


def _input(question: str) -> str:
    try:
        return input(question)
    except KeyboardInterrupt:
        typer.echo()
        raise


def _read_line(question: str) -> str:
    if sys.stdin.isatty():
        typer.echo(question, nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


@contextmanager
def interrupts(cancel: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set `cancel` meanwhile; a second one interrupts at once."""

    def stop(signal_number: int, frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
