"""A conversation, turn by turn: it keeps the messages, and what the model has read of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.session_file import read_session, write_session
from ..errors import BusyError, PromptError
from ..events import Commit, Done, Event, Result, ToolCall
from .prefix import rewind_to_common
from .replying import collect, stream

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..options import GenerationOptions
    from ..processing.images import ImageSource, PreparedImage, PreparedVideo, VideoSource
    from ..processing.messages import Message
    from ..processing.processor import Processor
    from ..processing.tools import Tool


class ChatSession:
    """A conversation in which a turn encodes only what it adds.

    system: the instructions. tools: schemas or typed functions, which are declared to the model and never called.
    thinking: let the model think first. options: None is the checkpoint's. All four can be changed between turns.

    A turn counts once its reply is done; one that fails, is cancelled or is not read to its end leaves the session as
    it was. One reply at a time, from any thread. The same seed in `options` gives the same conversation.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        processor: Processor,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        thinking: bool = False,
        options: GenerationOptions | None = None,
    ):
        self.model, self.processor = model, processor
        self.system, self.tools, self.thinking, self.options = system, tools, thinking, options
        self._turns: tuple[Message, ...] = ()
        self._cache = model.make_cache()
        self._lock = threading.Lock()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, the system's message first if there is one."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [dict(message) for message in self._turns]

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls of the last reply, which `send_tool_results` answers in this order."""
        calls = self._turns[-1].get("tool_calls") or () if self._turns else ()
        return [ToolCall(call["function"]["name"], call["function"]["arguments"], call["id"]) for call in calls]

    def send(
        self,
        text: str,
        images: Sequence[ImageSource | PreparedImage] = (),
        videos: Sequence[VideoSource | PreparedVideo] = (),
        *,
        cancel: threading.Event | None = None,
    ) -> Iterator[Event]:
        """The user's turn: the events of the reply, as `stream` gives them.

        images, videos: come before the text, in this order; `processor.prepare_video` makes a video with fewer frames
        or another speed. Setting `cancel`, or closing the iterator, stops within one step. Raises PromptError before
        anything is computed.
        """
        if self.tool_calls:
            raise PromptError("The last reply called tools; give their results with send_tool_results, or undo it.")
        return self._turn([{"role": "user", "content": self.processor.content(text, images, videos)}], cancel)

    def ask(
        self,
        text: str,
        images: Sequence[ImageSource | PreparedImage] = (),
        videos: Sequence[VideoSource | PreparedVideo] = (),
        *,
        cancel: threading.Event | None = None,
    ) -> Result:
        """`send`, to the end: the whole reply."""
        return collect(self.send(text, images, videos, cancel=cancel))

    def send_tool_results(self, results: Sequence[Any], *, cancel: threading.Event | None = None) -> Iterator[Event]:
        """What the tools gave, a result for each of `tool_calls` in order: the events of the reply that follows.

        A result is text, a number, a mapping or whatever else JSON can hold. Raises PromptError.
        """
        if not isinstance(results, Sequence) or isinstance(results, str | bytes):
            raise PromptError(f"Tool results are a list, one for each call, not a {type(results).__name__}.")
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
            self._turns = self._turns[: users[-1]]

    def reset(self) -> None:
        """Forget all turns, and free what they held."""
        with self._alone():
            self._turns, self._cache = (), self.model.make_cache()

    def save(self, path: str | Path) -> None:
        """Write the conversation, with what the model has read of it, to the file at `path`, which appears when it is
        whole. Tools and options are not part of it. Raises PromptError.
        """
        with self._alone():
            conversation = {"system": self.system, "thinking": self.thinking, "messages": list(self._turns)}
            write_session(path, self.model, conversation, self._read_so_far())

    def _read_so_far(self) -> Cache:
        """The part of the cache that belongs to the conversation: nothing of turns that were undone, nor of the last
        reply, which was read as it was drafted and not as history has it.
        """
        cache, messages = self._cache.fork(), self.messages
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if self._turns:
            prompt = self.processor.prompt(messages, tools=self.tools, thinking=self.thinking)
            rewind_to_common(self.model, cache, prompt)
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
            self._turns, self._cache = tuple(conversation["messages"]), cache

    def _turn(self, new: list[dict[str, Any]], cancel: threading.Event | None) -> Iterator[Event]:
        """The reply to `new` messages, checked and ready to run."""
        with self._alone():
            before = self._turns
            prompt = self.processor.prompt([*self.messages, *new], tools=self.tools, thinking=self.thinking)
            events = stream(self.model, self.processor, prompt, options=self.options, cache=self._cache, cancel=cancel)
        return self._run(events, before, (*before, *new))

    def _run(self, events: Iterator[Event], before: tuple[Message, ...], asked: tuple[Message, ...]) -> Iterator[Event]:
        commits: list[Commit] = []
        with self._alone(), closing(events):
            if self._turns is not before:
                raise PromptError("The conversation has changed since this was sent; send it again.")
            for event in events:
                match event:
                    case Commit():
                        commits.append(event)
                    case Done() if event.finish_reason != "cancelled":
                        self._turns = (*asked, _assistant_message(collect(commits)))
                yield event

    @contextmanager
    def _alone(self) -> Iterator[None]:
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
    """A tool's result as a message's content. Raises PromptError."""
    if result is None or isinstance(result, str | bool | int | float | Mapping):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"A tool's result cannot be written as JSON ({error}); give text instead.") from None
