"""Conversations that are kept on this machine: a JSON file for each, which only its user may read.

A file holds the chat messages; pictures are kept as the paths or URLs that they came from, and are read again when the
conversation goes on. The last `MOST` conversations stay, and of those as many as `MOST_BYTES` hold.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import PromptError
from ...files import WholeFile
from ...paths import data_directory, user_path
from ...processing.messages import normalize_messages

if TYPE_CHECKING:
    from ...generation.session import ChatSession

MOST, MOST_BYTES = 1000, 100 * 10**6
VARIABLE = "MLX_DG_LOGS"  # `off` keeps nothing, whatever `mlx-dg logs on` said
PICTURES = ("image", "video")  # kinds of parts, which are also the keys of their sources

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A kept conversation. model: the directory or repository it was held with. messages: the system's come first."""

    path: Path
    model: str
    thinking: bool
    messages: list[Message]

    @property
    def name(self) -> str:
        """The ID: when it began, and four characters that tell it from others."""
        return self.path.stem

    @property
    def turns(self) -> int:
        """The number of messages that are the user's."""
        return sum(message["role"] == "user" for message in self.messages)

    @property
    def title(self) -> str:
        """The first words of the user, in one line."""
        first = next((message for message in self.messages if message["role"] == "user"), {"content": ""})
        return " ".join(text_of(first).split())


def directory() -> Path:
    """Where they are kept. Raises PromptError where no home is known."""
    return data_directory() / "conversations"


def is_kept() -> bool:
    """Whether conversations are kept."""
    return os.environ.get(VARIABLE, "").lower() not in ("off", "0", "no", "false") and not _off().exists()


def set_kept(on: bool) -> None:
    """Keep conversations from now on, or none. Raises OSError."""
    if on:
        _off().unlink(missing_ok=True)
    else:
        _make_directory()
        _off().touch(mode=0o600)


def kept() -> list[Path]:
    """The files of all conversations, the one that was last changed first."""
    found = []
    for path in directory().glob("*.json"):
        with suppress(OSError):  # another process may have removed it
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def find(name: str) -> Path:
    """The file of the conversation whose name begins so; of the last one for "". Raises PromptError for none, or
    several.
    """
    paths = kept()
    if not paths:
        raise PromptError("No conversation is kept; `mlx-dg generate` and `mlx-dg chat` begin one.")
    found = [path for path in paths if path.stem.startswith(name)]
    if name and len(found) > 1 and name not in [path.stem for path in found]:
        raise PromptError(f"{len(found)} conversations are called {name}…; give more of the name.")
    if not found:
        raise PromptError(f"There is no conversation {name}; `mlx-dg logs` lists them.")
    return found[0]


def read(path: Path) -> Conversation:
    """Read a conversation. Raises PromptError where its file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, thinking, messages = str(content["model"]), content["thinking"] is True, content["messages"]
        normalize_messages(messages)  # or it is none that could go on
        return Conversation(path, model, thinking, messages)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, PromptError):
        raise PromptError(f"{path} is damaged; `mlx-dg logs remove {path.stem}` takes it away.") from None


def text_of(message: Message) -> str:
    """A message's text, with its pictures named."""
    content = message["content"]
    if not isinstance(content, list):
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return " ".join(part.get("text") or f"({part['type']})" for part in content)


class Keeper:
    """Keeps the conversation of a session, where conversations are kept, each time that `keep` is called.

    model: what the session runs on. tell: is given a sentence when the first one ever is kept, and where one cannot
    be, which is no error.
    """

    def __init__(self, session: ChatSession, model: str, tell: Callable[[str], object]):
        self.session, self.tell = session, tell
        self.model = str(user_path(model).resolve()) if user_path(model).is_dir() else model
        self._path: Path | None = None
        self._written = b""  # what the file holds, unless somebody else has written it
        self._sources: dict[Any, str] = {}  # of prepared pictures

    def begin(self) -> None:
        """Keep what follows as a conversation of its own."""
        self._path, self._written = None, b""

    def resume(self, conversation: Conversation) -> None:
        """Go on with a kept conversation in the session, and keep it in the same file. Raises PromptError.

        Instructions that the session was given win over the conversation's.
        """
        system = self.session.system
        self.session.resume([self._with_pictures(message) for message in conversation.messages])
        self.session.system = system or self.session.system
        self.session.thinking = self.session.thinking or conversation.thinking
        self._path, self._written = conversation.path, conversation.path.read_bytes()

    def keep(self, sources: Sequence[str] = ()) -> None:
        """Keep the conversation as it is now. sources: where the pictures of the last turn came from, in order."""
        messages = self.session.messages
        if self.session.tool_calls:  # a call without its result is no end
            return
        users = [message for message in messages if message["role"] == "user"]
        if users and sources:
            self._sources |= dict(zip(_pictures(users[-1]), map(_absolute, sources), strict=True))
        try:
            if not is_kept():
                return
            if users:
                self._write(messages)
            elif self._path:
                self._path.unlink(missing_ok=True)
        except (OSError, PromptError) as error:
            self.tell(f"This conversation cannot be kept ({error}).")

    def _write(self, messages: list[Message]) -> None:
        plain = [self._with_sources(message) for message in messages]
        content = {"model": self.model, "thinking": self.session.thinking, "messages": plain}
        text = (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", errors="replace")
        if _make_directory():
            self.tell(f"Conversations are kept in {directory()}; `mlx-dg logs off` ends that.")
        if self._path is None or not self._is_ours(self._path):
            self._path = directory() / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.json"
        new = not self._path.exists()
        with WholeFile(self._path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text)
        self._written = text
        if new:
            _forget_oldest()

    def _is_ours(self, path: Path) -> bool:
        """Whether nobody else has gone on with the conversation meanwhile; whoever comes second keeps a copy."""
        try:
            return path.read_bytes() == self._written
        except FileNotFoundError:
            return True

    def _with_sources(self, message: Message) -> Message:
        """Put the sources of pictures in their place; None where a picture has none, as those of saved sessions."""
        if not isinstance(message["content"], list):
            return message
        parts = [
            {**part, part["type"]: self._sources.get(part[part["type"]])} if part["type"] in PICTURES else part
            for part in message["content"]
        ]
        return {**message, "content": parts}

    def _with_pictures(self, message: Message) -> Message:
        """Read the pictures of a kept message again. Raises PromptError where that cannot be done."""
        if message["role"] != "user" or not isinstance(message["content"], list):
            return message
        given = {kind: [part[kind] for part in message["content"] if part["type"] == kind] for kind in PICTURES}
        sources = [*given["image"], *given["video"]]
        if None in sources:
            raise PromptError("That conversation shows pictures of a saved session; go on with it by /load in a chat.")
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        new = {**message, "content": self.session.processor.content(text, *given.values())}
        self._sources |= dict(zip(_pictures(new), sources, strict=True))
        return new


def _pictures(message: Message) -> list[Any]:
    """The prepared images and videos of a message, in order."""
    content = message["content"] if isinstance(message["content"], list) else []
    return [part[part["type"]] for part in content if part["type"] in PICTURES]


def _absolute(source: str) -> str:
    is_url = source[:8].lower().startswith(("data:", "http://", "https://"))
    return source if is_url else str(user_path(source).resolve())


def _off() -> Path:
    return directory() / "off"


def _make_directory() -> bool:
    """Make sure that there is a place for conversations; whether there was none. Raises OSError."""
    if directory().is_dir():
        return False
    directory().parent.mkdir(parents=True, exist_ok=True)
    directory().mkdir(mode=0o700, exist_ok=True)
    return True


def _forget_oldest() -> None:
    """Delete what is beyond the bounds; the last conversation always stays."""
    room = MOST_BYTES
    for number, path in enumerate(kept()):
        with suppress(OSError):
            room -= path.stat().st_size
            if number and (number >= MOST or room < 0):
                path.unlink()
