"""Lines from the user of `mlx-dg chat`: edited at a terminal, read as they are from a pipe."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer

# Shows a question and returns the answer. Raises EOFError where there is no more, KeyboardInterrupt at Ctrl-C.
Read = Callable[[str], str]


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def message_reader() -> Read:
    """Make what reads messages: at a terminal with line editing and a history of its own, where pasted lines stay one
    message and Esc Enter begins a new line.
    """
    if not at_terminal():
        return _read_line
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        return answer_reader()
    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return PromptSession(key_bindings=keys).prompt


def answer_reader() -> Read:
    """Make what reads short answers, which no history keeps where `message_reader` has one."""
    if not at_terminal():
        return _read_line
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives `input` line editing)
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
