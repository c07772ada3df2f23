"""mlx-dg chat: a conversation at the terminal, or with a pipe."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import DiffusionGemmaError, PromptError
from ...paths import user_path
from ..common import LiveCanvas, MaxTokens, Model, Seed, Steps, end_line, load_model
from .input import Read, answer_reader, at_terminal, interrupts, message_reader
from .tools import Functions, load_functions, run_call, written

if TYPE_CHECKING:
    from ...events import Done, Event, ToolCall
    from ...generation.session import ChatSession

MOST_CALLS = 8  # replies in a row that call tools
HELP = """\
/image PATH   show the model an image with your next message
/video PATH   show it a GIF, WebP or APNG, frame by frame
/system TEXT  set the instructions; without text, take them away
/think        let the model think first, or stop that
/undo         forget the last turn
/reset        forget all turns
/save PATH    write the conversation to a file; /save --force PATH to one that is something else
/load PATH    go on with the conversation in a file
/quit         leave, as Ctrl-D does
Esc Enter begins a new line; Ctrl-C stops a reply, and its turn is forgotten; // begins a message with a slash."""


def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", "--system-prompt", help="A system message.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first.")] = False,
    tools: Annotated[
        Path | None, typer.Option("--tools", metavar="FILE.py", help="Typed functions that it may ask you to run.")
    ] = None,
    max_tokens: MaxTokens = 1024,
    steps: Steps = None,
    seed: Seed = None,
    live: LiveCanvas = None,
) -> None:
    """Talk; every turn costs only what is new. Piped, a line is a turn."""
    from ... import ChatSession, GenerationOptions

    functions = load_functions(tools) if tools else {}
    options = GenerationOptions(max_tokens=max_tokens, max_steps=steps, seed=seed)
    loaded, processor = load_model(model)
    session = ChatSession(loaded, processor, system, list(functions.values()), thinking, options)
    talk = _Chat(session, functions, live)
    if at_terminal():
        typer.secho("/help lists the commands, Ctrl-D leaves.", err=True, dim=True)
    talk.run(message_reader())
    if talk.failed and not at_terminal():
        raise typer.Exit(1)


class _Chat:
    """The user's side of a session: what a line means, and what is shown for it."""

    def __init__(self, session: ChatSession, functions: Functions, live: bool | None):
        self.session, self.functions, self.live = session, functions, live
        self.images: list[Any] = []  # for the next message
        self.videos: list[Any] = []
        self.failed = False
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: _say(HELP),
            "image": self._image,
            "video": self._video,
            "system": self._system,
            "think": self._think,
            "undo": self._undo,
            "reset": self._reset,
            "save": self._save,
            "load": self._load,
        }

    def run(self, read: Read) -> None:
        """Read and answer until there is nothing more to read."""
        while True:
            try:
                line = read("> ").strip()
                if line in ("/quit", "/exit"):
                    return
                if line:
                    self._take(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not at_terminal():
                    raise
            except DiffusionGemmaError as error:
                self.failed = True
                _say(f"mlx-dg: {error}")

    def _take(self, line: str) -> None:
        if not line.startswith("/") or line.startswith("//"):
            text = line.removeprefix("/") if line.startswith("//") else line
            self._turn(lambda cancel: self.session.send(text, self.images, self.videos, cancel=cancel))
            self.images, self.videos = [], []  # a message that is refused leaves them for the next
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            raise PromptError(f"There is no command /{name}; /help lists them, and // begins a message with a slash.")
        self.commands[name](rest.strip())

    def _turn(self, send: Callable[[threading.Event], Iterator[Event]]) -> None:
        """Show a reply, and those after it while the model calls tools. A turn that is not finished is forgotten."""
        turns = len(self.session.messages)
        try:
            done = self._show(send)
            for _ in range(MOST_CALLS):
                if done.finish_reason == "cancelled" or not self.session.tool_calls:
                    break
                results = [self._answer(call) for call in self.session.tool_calls]
                done = self._show(lambda cancel, given=results: self.session.send_tool_results(given, cancel=cancel))
            if self.session.tool_calls:
                raise PromptError(f"The model called tools {MOST_CALLS} times in a row; ask in another way.")
            if done.finish_reason == "cancelled":
                _say("Stopped; this turn is forgotten.")
        finally:
            if self.session.tool_calls and len(self.session.messages) > turns:
                self.session.undo()

    def _show(self, send: Callable[[threading.Event], Iterator[Event]]) -> Done:
        from ...display.terminal import show, statistics_line

        cancel = threading.Event()
        options = self.session.options.filled_from(self.session.model.options)
        with interrupts(cancel):
            done = show(send(cancel), live=self.live, options=options)
        end_line()
        typer.secho(statistics_line(done.stats), err=True, dim=True)
        if done.note:
            _say(done.note)
        return done

    def _answer(self, call: ToolCall) -> Any:
        """Run the tool that is called, if the user lets it, and return what it gives."""
        from ...display.cells import printable

        asked = printable(written(call))
        if call.name not in self.functions:
            _say(f"The model asks for {asked}, which is not among the tools.")
            return {"error": "there is no such tool"}
        if not at_terminal():
            _say(f"{asked} was not run: only at a terminal can you allow it.")
            return {"error": "the user did not allow this call"}
        try:
            allowed = answer_reader()(f"Run {asked}? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            allowed = False
        return run_call(self.functions, call) if allowed else {"error": "the user did not allow this call"}

    def _image(self, path: str) -> None:
        from ...processing.images import load_image

        image = load_image(_source(_unquoted(path, "/image")))
        self.images.append(image)
        _say(f"{image.width} × {image.height} pixels, for your next message")

    def _video(self, path: str) -> None:
        from ...processing.images import timestamp

        video = self.session.processor.prepare_video(_source(_unquoted(path, "/video")))
        self.videos.append(video)
        count = len(video.frames)
        _say(f"{count} frame{'s' * (count != 1)}, the last at {timestamp(video.times[-1])}, for your next message")

    def _system(self, text: str) -> None:
        self.session.system = text or None
        _say("The instructions are set." if text else "There are no instructions now.")

    def _think(self, _: str) -> None:
        self.session.thinking = not self.session.thinking
        _say("The model thinks first." if self.session.thinking else "The model answers at once.")

    def _undo(self, _: str) -> None:
        self.session.undo()
        _say("The last turn is forgotten.")

    def _reset(self, _: str) -> None:
        self.session.reset()
        _say("All turns are forgotten.")

    def _save(self, path: str) -> None:
        force, _, rest = path.partition(" ")
        path = rest.strip() if force == "--force" else path
        self.session.save(user_path(_unquoted(path, "/save")), force=force == "--force")
        _say("Saved.")

    def _load(self, path: str) -> None:
        self.session.restore(user_path(_unquoted(path, "/load")))
        turns = sum(message["role"] == "user" for message in self.session.messages)
        _say(f"{turns} turn{'s' * (turns != 1)} loaded.")


def _source(text: str) -> str | Path:
    """Read what names a picture: a URL as it is, a path as the shell would read it."""
    return text if text.lower().startswith(("data:", "http://", "https://")) else user_path(text)


def _unquoted(path: str, command: str) -> str:
    """Take the quotes off a path that was typed, or dropped on a terminal. Raises PromptError where there is none."""
    path = path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path
    if not path:
        raise PromptError(f"{command} needs a path: {command} PATH")
    return path


def _say(text: str) -> None:
    typer.echo(text, err=True)
