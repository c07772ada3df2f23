"""A turn as the user sees it: the reply, and the tools that it calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from ...errors import PromptError
from ..common import end_line, say
from ..keeping.shown import shortened
from .input import answer_reader, at_terminal, interrupts
from .tools import Failure, Functions, run_call, written

if TYPE_CHECKING:
    from ...events import Done, Event, ToolCall
    from ...generation.session import ChatSession

MOST_CALLS = 8  # replies in a row that call tools
Send = Callable[[threading.Event], Iterator["Event"]]


class Turns:
    """Shows the replies of a session, and runs the tools that they call where the user lets it.

    live, heat: as `display.terminal.show` takes them; they can be changed between turns.
    """

    def __init__(self, session: ChatSession, functions: Functions, live: bool | None = None, heat: bool = False):
        self.session, self.functions, self.live, self.heat = session, functions, live, heat

    def take(self, send: Send) -> bool:
        """Show a reply, and those after it while the model calls tools. A turn that is not finished is forgotten.

        Returns whether it was finished.

        Ctrl-C ends the turn wherever it is, at a terminal; elsewhere KeyboardInterrupt comes through, once a reply is
        stopped. Raises PromptError where the model does not stop to call tools.
        """
        turns = len(self.session.messages)
        try:
            done = self._show(send)
            for _ in range(MOST_CALLS):
                if done.finish_reason == "cancelled" or not self.session.tool_calls:
                    break
                results = [self._answer(call) for call in self.session.tool_calls]
                done = self._show(self._with_results(results))
            if self.session.tool_calls and done.finish_reason != "cancelled":
                raise PromptError(f"The model called tools {MOST_CALLS} times in a row; ask in another way.")
            if done.finish_reason != "cancelled":
                return True
            say("Stopped; this turn is forgotten.")
        except KeyboardInterrupt:
            if not at_terminal():
                raise
            say("Stopped; this turn is forgotten.")
        finally:
            if self.session.tool_calls and len(self.session.messages) > turns:
                self.session.undo()
        return False

    def _with_results(self, results: list[Any]) -> Send:
        return lambda cancel: self.session.send_tool_results(results, cancel=cancel)

    def _show(self, send: Send) -> Done:
        from ...display.terminal import show, statistics_line

        cancel = threading.Event()
        options = self.session.options.filled_from(self.session.model.options)
        with interrupts(cancel):
            done = show(send(cancel), live=self.live, heat=self.heat, options=options)
        if done.finish_reason == "cancelled":
            return done
        if not (self.session.tool_calls and not self.session.messages[-1]["content"]):
            end_line()
        typer.secho(statistics_line(done.stats), err=True, dim=True)
        if done.note:
            say(done.note)
        return done

    def _answer(self, call: ToolCall) -> Any:
        """Run the tool that is called, if the user lets it, and return what it gives."""
        from ...display.cells import printable

        asked = printable(written(call))
        if call.name not in self.functions:
            say(f"The model asks for {asked}, which is not among the tools.")
            return {"error": "there is no such tool"}
        if not at_terminal():
            say(f"{asked} was not run: only at a terminal can you allow it.")
            return {"error": "the user did not allow this call"}
        try:
            allowed = answer_reader()(f"Run {asked}? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            allowed = False
        if not allowed:
            say(f"{call.name} was not run.")
            return {"error": "the user did not allow this call"}
        try:
            result = run_call(self.functions, call)
        except Failure as failure:
            say(f"{call.name} failed: {printable(str(failure))}")
            return {"error": str(failure)}
        say(f"{call.name} gave {printable(shortened(result))}")
        return result
