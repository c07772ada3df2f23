"""The verb `mlx-dg chat`: a conversation at the terminal, or with a pipe."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import DiffusionGemmaError, PromptError
from ...paths import user_path
from ..common import (
    AdapterPath,
    CanvasLength,
    Confidence,
    Continue,
    EntropyBound,
    Heat,
    LiveCanvas,
    MaxTokens,
    Mode,
    Model,
    Seed,
    Steps,
    Stop,
    System,
    Thinking,
    Tools,
    Yes,
    load_model,
    named_model,
    notice,
    say,
)
from ..keeping.conversations import Keeper, find, read
from ..keeping.shown import show_message
from .decoding import Decoding, MinP, RepetitionPenalty, Schema, Temp, TopK, TopP, make_options, read_schema
from .input import Read, at_terminal, message_reader
from .settings import NAMES, change
from .tools import Functions, load_functions
from .turns import Turns

if TYPE_CHECKING:
    from ...generation.session import ChatSession

HELP = """\
/image PATH      show the model an image with your next message
/video PATH      show it a GIF, WebP or APNG, frame by frame
/system TEXT     set the instructions; without text, take them away
/think           let the model think first, or stop that
/decoder NAME    write with diffusion, ar (left to right) or speculative
/schema FILE     make replies valid for a JSON Schema; /schema off lets them
                 be text again
/set NAME VALUE  change an option, such as /set steps 24; /set lists them
/undo            forget the last turn
/reset           forget all turns
/save PATH       write the conversation to a file; /save --force PATH to one
                 that is something else
/load PATH       go on with the conversation in a file
/bye             leave, as /quit, /exit and Ctrl-D do
Ctrl-C stops a reply, and its turn is forgotten; // begins a message with a
slash."""
WITH_EDITOR = "\nTab completes commands and paths; Esc Enter begins a new line."
WITHOUT_EDITOR = "\npip install prompt_toolkit adds completion, and messages of several lines."
LEAVE = ("/bye", "/quit", "/exit")
TAKE_PATHS = ("image", "video", "schema", "save", "load")
TAKE_NOTHING = ("help", "think", "undo", "reset")


def chat(
    model: Model = None,
    adapter: AdapterPath = None,
    go_on: Continue = False,
    system: System = None,
    thinking: Thinking = False,
    tools: Tools = None,
    schema: Schema = None,
    max_tokens: MaxTokens = 1024,
    decoder: Decoding = "diffusion",
    mode: Mode = "reference",
    steps: Steps = None,
    entropy_bound: EntropyBound = None,
    confidence: Confidence = None,
    canvas_length: CanvasLength = None,
    temp: Temp = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = None,
    live: LiveCanvas = None,
    heat: Heat = False,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep what you type for the next chat's arrow keys.")
    ] = True,
    yes: Yes = False,
) -> None:
    """Talk; every turn costs only what is new. Piped, a line is a turn."""
    from ... import ChatSession

    functions = load_functions(tools) if tools else {}
    options = make_options(
        max_tokens=max_tokens,
        decoder=decoder,
        mode=mode,
        steps=steps,
        entropy_bound=entropy_bound,
        confidence=confidence,
        canvas_length=canvas_length,
        stop=stop,
        seed=seed,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    form = None if schema is None else read_schema(schema)
    last = read(find("")) if go_on else None
    source = named_model(last.model if last and model is None else model)
    loaded, processor = load_model(source, yes=yes, adapter=adapter)
    session = ChatSession(loaded, processor, system, list(functions.values()), thinking, options)
    keeper = Keeper(session, source, notice)
    talk = _Chat(session, functions, keeper, live, heat)
    if form is not None:
        talk.follow(form, str(schema))
    if last:
        keeper.resume(last)
        talk.show_again()
    if at_terminal():
        typer.secho("/help lists the commands, Ctrl-D leaves.", err=True, dim=True)
    talk.run(message_reader((*talk.commands, "bye"), TAKE_PATHS, NAMES, keep=history))
    if talk.failed and not at_terminal():
        raise typer.Exit(1)


class _Chat:
    """The user's side of a session: what a line means, and what is shown for it."""

    def __init__(
        self,
        session: ChatSession,
        functions: Functions,
        keeper: Keeper,
        live: bool | None,
        heat: bool = False,
    ):
        self.session, self.turns = session, Turns(session, functions, live, heat)
        self.keeper = keeper
        self.images: list[tuple[str, Any]] = []  # for the next message, with their sources
        self.videos: list[tuple[str, Any]] = []
        self.schema: dict[str, Any] | None = None
        self.schema_source = "off"
        self.failed = False
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: say(HELP + (WITH_EDITOR if find_spec("prompt_toolkit") else WITHOUT_EDITOR)),
            "image": self._image,
            "video": self._video,
            "system": self._system,
            "think": self._think,
            "decoder": lambda text: say(change(self.turns, f"decoder {text}")),
            "schema": self._schema,
            "set": lambda text: say(change(self.turns, text)),
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
                if line in LEAVE:
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
                say(f"mlx-dg: {error}")

    def _take(self, line: str) -> None:
        if not line.startswith("/") or line.startswith("//"):
            text = line.removeprefix("/") if line.startswith("//") else line
            images, videos = ([picture for _, picture in pictures] for pictures in (self.images, self.videos))
            form = self.schema
            if self.turns.take(lambda cancel: self.session.send(text, images, videos, schema=form, cancel=cancel)):
                self.keeper.keep([source for source, _ in (*self.images, *self.videos)])
            self.images, self.videos = [], []  # a message that is refused leaves them for the next
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            raise PromptError(f"There is no command /{name}; /help lists them, and // begins a message with a slash.")
        if name in TAKE_NOTHING and rest.strip():
            raise PromptError(f"/{name} takes nothing after it; write /{name} alone.")
        self.commands[name](rest.strip())

    def _image(self, path: str) -> None:
        from ...processing.images import load_image

        source = _unquoted(path, "/image")
        image = load_image(_source(source))
        self.images.append((source, image))
        say(f"{image.width} × {image.height} pixels, for your next message")

    def _video(self, path: str) -> None:
        from ...processing.images import timestamp

        source = _unquoted(path, "/video")
        video = self.session.processor.prepare_video(_source(source))
        self.videos.append((source, video))
        count = len(video.frames)
        say(f"{count} frame{'s' * (count != 1)}, the last at {timestamp(video.times[-1])}, for your next message")

    def _system(self, text: str) -> None:
        self.session.system = text or None
        say("The instructions are set." if text else "There are no instructions now.")

    def _think(self, _: str) -> None:
        self.session.thinking = not self.session.thinking
        say("The model thinks first." if self.session.thinking else "The model answers at once.")

    def _schema(self, path: str) -> None:
        if path == "off":
            self.schema, self.schema_source = None, "off"
        elif path:
            source = user_path(_unquoted(path, "/schema"))
            self.follow(read_schema(source), str(source))
        say(f"schema: {self.schema_source}")

    def follow(self, schema: dict[str, Any], source: str) -> None:
        """Make the next replies valid for a schema. Raises PromptError where that cannot be honoured."""
        from ...generation.request import request_options
        from ...processing.processor import Prompt

        ends = request_options(self.session.model, self.session.options, in_grammar=True).end_tokens
        self.session.processor.grammar(Prompt("", []), ends, schema=schema)
        self.schema, self.schema_source = schema, source

    def _undo(self, _: str) -> None:
        self.session.undo()
        self.keeper.keep()
        say("The last turn is forgotten.")

    def _reset(self, _: str) -> None:
        self.session.reset()
        self.keeper.begin()
        say("All turns are forgotten.")

    def _save(self, path: str) -> None:
        force, _, rest = path.partition(" ")
        path = rest.strip() if force == "--force" else path
        self.session.save(user_path(_unquoted(path, "/save")), force=force == "--force")
        say("Saved.")

    def _load(self, path: str) -> None:
        self.session.restore(user_path(_unquoted(path, "/load")))
        self.keeper.begin()
        self.show_again()

    def show_again(self) -> None:
        """Show the conversation that goes on."""
        turns = sum(message["role"] == "user" for message in self.session.messages)
        for message in self.session.messages:
            show_message(message)
        say(f"{turns} turn{'s' * (turns != 1)} loaded.")


def _source(text: str) -> str | Path:
    """Read what names a picture: a URL as it is, a path as the shell would read it."""
    return text if text.lower().startswith(("data:", "http://", "https://")) else user_path(text)


def _unquoted(path: str, command: str) -> str:
    """Take the quotes off a path that was typed, or dropped on a terminal. Raises PromptError where there is none."""
    path = path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path
    if not path:
        raise PromptError(f"{command} needs a path: {command} PATH")
    return path
