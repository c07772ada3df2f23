"""Messages of earlier turns as a terminal shows them."""

from __future__ import annotations

import json
from typing import Any

import typer

from ..chatting.tools import written_call
from .conversations import text_of

MOST_SHOWN = 300  # characters of what a tool gives


def show_message(message: dict[str, Any], *, err: bool = True) -> None:
    """Show a message of a conversation that goes on. err: on stderr, as it is no answer to anything."""
    from ...display.cells import printable

    role, text = message["role"], printable(text_of(message))
    if role in ("user", "system"):
        typer.secho(f"{'> ' if role == 'user' else ''}{text}", err=err, bold=role == "user", dim=role == "system")
    elif text and role == "assistant":
        typer.echo(text, err=err)
    for call in message.get("tool_calls") or ():
        function = call["function"]
        typer.secho(printable(written_call(function["name"], function["arguments"])), err=err, dim=True)
    if role == "tool":
        typer.secho(f"gave {printable(shortened(message['content']))}", err=err, dim=True)


def shortened(result: Any) -> str:
    """Write what a tool gave in one line that a terminal has room for."""
    try:
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(result)
    text = " ".join(text.split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text):,} characters)"
