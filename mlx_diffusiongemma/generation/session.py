"""A conversation, turn by turn: it keeps the messages, and what the model has read of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.session_file import read_session, write_session
from ..errors import BusyError, PromptError
from ..events import Commit, Done, Event, Result, ToolCall
from ..options import GenerationOptions
from ..processing.messages import normalize_messages
from ..processing.tools import DEEPEST
from .prefix import rewind_to_common
from .replying import collect, stream

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.images import ImageSource, PreparedImage, PreparedVideo, VideoSource
    from ..processing.processor import Processor, Prompt
    from ..processing.tools import Tool


class ChatSession:
    """A conversation in which a turn encodes only what it adds.

    system: the instructions. tools: schemas or typed functions, which are declared to the model and never called.
    thinking: let the model think first. options: None is the checkpoint's. allow_files, allow_urls: whether images and
    videos may be named by path and by http(s) URL; see `Processor.prompt`. All of them can be changed between turns.

    A turn counts once its reply is done; one that fails, is cancelled or is not read to its end leaves the session as
    it was. One reply at a time, from any thread; BusyError refuses another. The same seed in `options` gives the same
    conversation.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        processor: Processor,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        thinking: bool = False,
        options: GenerationOptions | None = None,
        *,
        allow_files: bool = True,
        allow_urls: bool = False,
    ) -> None:
        self.model, self.processor = model, processor
        self.system, self.tools, self.thinking = system, tools, thinking
        self.options = GenerationOptions() if options is None else options
        self.allow_files, self.allow_urls = allow_files, allow_urls
        self._turns: tuple[dict[str, Any], ...] = ()
        self._cache = model.make_cache()
        self._changes = 0  # how often this has become another conversation
        self._lock = threading.Lock()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far as chat messages, the system's first if there is one.

        A copy, for the caller to keep or change; only prepared images and videos are the session's own.
        """
        return [_copied(message) for message in self._history()]

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls of the last reply, which `send_tool_results` answers in this order."""
        calls = self._turns[-1].get("tool_calls") or () if self._turns else ()
        return [
            ToolCall(call["function"]["name"], _copied(call["function"]["arguments"]), call["id"]) for call in calls
        ]

    def send(
        self,
        text: str,
        images: Sequence[ImageSource | PreparedImage] = (),
        videos: Sequence[VideoSource | PreparedVideo] = (),
        *,
        schema: Any = None,
        grammar: str | None = None,
        tool_choice: str | None = None,
        cancel: threading.Event | None = None,
    ) -> Generator[Event, None, None]:
        """Take the user's turn; its events are those of the reply, as `stream` gives them.

        images, videos: come before the text, in this order; `processor.prepare_video` makes a video with fewer frames
        or another speed. schema, grammar, tool_choice: what the reply has to be like; see `stream`. Setting `cancel`,
        or closing the iterator, stops within one step. Raises PromptError before anything is computed, and from the
        events where the conversation has changed before the first is read.
        """
        content = self.processor.content(text, images, videos, allow_files=self.allow_files, allow_urls=self.allow_urls)
        with self._alone():
            if self.tool_calls:
                raise PromptError("The last reply called tools; give their results with send_tool_results, or undo it.")
            asked = {"schema": schema, "grammar": grammar, "tool_choice": tool_choice}
            return self._turn([{"role": "user", "content": content}], cancel, **asked)

    def ask(
        self,
        text: str,
        images: Sequence[ImageSource | PreparedImage] = (),
        videos: Sequence[VideoSource | PreparedVideo] = (),
        *,
        schema: Any = None,
        grammar: str | None = None,
        tool_choice: str | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Take the user's turn and wait for the whole reply: `send`, to its end."""
        asked = {"schema": schema, "grammar": grammar, "tool_choice": tool_choice}
        return collect(self.send(text, images, videos, **asked, cancel=cancel))

    def send_tool_results(
        self, results: Sequence[Any], *, cancel: threading.Event | None = None
    ) -> Generator[Event, None, None]:
        """Give the model what its tools gave, a result for each of `tool_calls` in order; events are as in `send`.

        A result is text, a number, a mapping or whatever else JSON can hold. Raises PromptError.
        """
        if not isinstance(results, Sequence) or isinstance(results, str | bytes):
            raise PromptError(f"Tool results are a list, one for each call, not a {type(results).__name__}.")
        with self._alone():
            calls = self.tool_calls
            if not calls or len(results) != len(calls):
                raise PromptError(f"The last reply called {len(calls)} tools; {len(results)} results were given.")
            answers = [
                {"role": "tool", "tool_call_id": call.id, "content": _tool_content(result)}
                for call, result in zip(calls, results, strict=True)
            ]
            return self._turn(answers, cancel)

    def undo(self) -> None:
        """Forget the last turn: what the user said and all that followed. Raises PromptError where there is none."""
        with self._alone():
            users = [place for place, message in enumerate(self._turns) if message["role"] == "user"]
            if not users:
                raise PromptError("There is no turn to undo.")
            self._become(self._turns[: users[-1]], self._cache)

    def reset(self) -> None:
        """Forget all turns, and free what they held."""
        with self._alone():
            self._become((), self.model.make_cache())

    def resume(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Go on with chat messages, such as `messages` of another session, instead of this conversation.

        Those of the system that they begin with are the instructions. The next turn encodes all of them. Raises
        PromptError where they are no conversation; the session is then what it was.
        """
        with self._alone():
            normalize_messages(messages)
            turns = [_copied(dict(message)) for message in messages]
            self.system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
            self._become(tuple(turns), self.model.make_cache())

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the conversation, with what the model has read of it, to the file at `path`, which appears when it is
        whole. Tools and options are not part of it. force: replace a file that is no saved session, too. Raises
        PromptError.
        """
        with self._alone():
            conversation = {"system": self.system, "thinking": self.thinking, "messages": list(self._turns)}
            write_session(path, self.model, conversation, self._read_so_far(), force=force)

    def _read_so_far(self) -> Cache:
        """Copy the part of the cache that belongs to the conversation: nothing of turns that were undone, nor of the
        last reply, which was read as it was drafted and not as history has it.
        """
        cache, messages = self._cache.fork(), self._history()
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if self._turns:
            rewind_to_common(self.model, cache, self._prompt(messages))
        else:
            cache.clear()
        return cache

    def restore(self, path: str | Path) -> None:
        """Go on with the conversation in the file at `path`, instead of this one. Raises PromptError where there is no
        such file, CheckpointError where it is damaged or of another model; the session is then what it was.
        """
        with self._alone():
            conversation, cache = read_session(path, self.model)
            self.system, self.thinking = conversation["system"], conversation["thinking"]
            self._become(tuple(conversation["messages"]), cache)

    def _history(self) -> list[dict[str, Any]]:
        """List the session's own messages, which no caller may hold."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self._turns]

    def _prompt(self, messages: list[dict[str, Any]]) -> Prompt:
        return self.processor.prompt(
            messages,
            tools=self.tools,
            thinking=self.thinking,
            allow_files=self.allow_files,
            allow_urls=self.allow_urls,
        )

    def _turn(
        self,
        new: list[dict[str, Any]],
        cancel: threading.Event | None,
        schema: Any = None,
        grammar: str | None = None,
        tool_choice: str | None = None,
    ) -> Generator[Event, None, None]:
        """Check a turn's `new` messages and prepare the reply to them; reading its events computes it."""
        prompt = self._prompt([*self._history(), *new])
        events = stream(
            self.model,
            self.processor,
            prompt,
            schema=schema,
            grammar=grammar,
            tool_choice=tool_choice,
            options=self.options,
            cache=self._cache,
            cancel=cancel,
        )
        return self._run(events, (*self._turns, *new), self._changes)

    def _run(
        self, events: Generator[Event, None, None], asked: tuple[dict[str, Any], ...], changes: int
    ) -> Generator[Event, None, None]:
        """Pass the reply's events on. Once it is done, the conversation is what was `asked`, and the reply.

        changes: how many there were when it was asked. With any since, `events` would write to a cache, and the reply
        belong to a conversation, that the session no longer has.
        """
        commits: list[Commit] = []
        with self._alone(), closing(events):
            if self._changes != changes:
                raise PromptError("The conversation has changed since this was sent; send it again.")
            for event in events:
                match event:
                    case Commit():
                        commits.append(deepcopy(event))  # the caller may change what it is given
                    case Done() if event.finish_reason != "cancelled":
                        self._become((*asked, _assistant_message(collect(commits))), self._cache)
                yield event

    def _become(self, turns: tuple[dict[str, Any], ...], cache: Cache) -> None:
        self._turns, self._cache = turns, cache
        self._changes += 1

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep every other request out meanwhile. Raises BusyError where one is in."""
        if not self._lock.acquire(blocking=False):
            raise BusyError("This session is busy with a reply; let it end, cancel it or close its events first.")
        try:
            yield
        finally:
            self._lock.release()


def _assistant_message(reply: Result) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.thinking:
        message["reasoning"] = reply.thinking
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
    return message


def _tool_content(result: Any) -> Any:
    """Make a message's content of a tool's result: of a mapping what JSON reads, so that nobody else holds a part of
    it. Raises PromptError.
    """
    if result is None or isinstance(result, str | bool | int | float):
        return result
    try:
        text = json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"A tool's result cannot be written as JSON ({error}); give text instead.") from None
    if not isinstance(result, Mapping):
        return text
    if _is_deeper(result, DEEPEST):
        raise PromptError(f"A tool's result is nested more than {DEEPEST} levels deep; give text instead.")
    return json.loads(text)


def _is_deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels < 0 or any(_is_deeper(item, levels - 1) for item in items)


def _copied(value: Any) -> Any:
    """Copy a message or a part of it, but not prepared pictures, which are large and never change."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
