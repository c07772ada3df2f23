"""Chat messages in the one form that every published chat template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..errors import PromptError
from ..events import ToolCall
from .tools import call_id

ROLES = ("system", "developer", "user", "assistant", "tool")
# Where a part may carry its picture or its video: in the spellings of Transformers and OpenAI.
IMAGE_KEYS = ("image", "url", "path", "image_url")
VIDEO_KEYS = ("video", "url", "path", "video_url")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class VideoPart:
    """A video part of a message: its source, and how to sample it; None is `sample_video`'s own choice."""

    source: Any
    frames: Any
    fps: Any


def normalize_messages(messages: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Check chat messages and rewrite them in the one form that every chat template reads.

    Returns new messages, and in order what every image or video part holds: an image's source, None where `images` has
    to fill it, or a `VideoPart`.

    `model` becomes `assistant`; tool calls become `{"id", "type": "function", "function": {"name", "arguments"}}` with
    a mapping for arguments and an id that no other call has; a tool's answer gets the id of its call; image and video
    parts become `{"type": "image"}`: every template has one place holder for that, and not all know videos. Raises
    PromptError.
    """
    sources: list[Any] = []
    normal: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        where = f"Message {number}"
        if not isinstance(message, Mapping):
            raise PromptError(f'{where} is a {type(message).__name__}; write {{"role": "user", "content": "…"}}.')
        role = "assistant" if message.get("role") == "model" else message.get("role")
        if role not in ROLES:
            raise PromptError(f"{where} has the role {message.get('role')!r}; a role is one of {', '.join(ROLES)}.")
        for key in ("reasoning", "reasoning_content", "thinking"):
            if not isinstance(message.get(key) or "", str):
                raise PromptError(f"{where}: `{key}` must be text, not a {type(message[key]).__name__}.")
        new = {**message, "role": role, "content": _content(message, role, where, sources)}
        new["tool_calls"] = _tool_calls(message.get("tool_calls") or [], role, where) or None
        normal.append(new)
    if not normal:
        raise PromptError("There are no messages; give at least one.")
    _match_answers(normal)
    return normal, sources


def call_ids(messages: Sequence[Message]) -> list[str]:
    """List the ids of all tool calls in messages that `normalize_messages` returned."""
    return [call["id"] for message in messages for call in message.get("tool_calls") or ()]


def _match_answers(messages: list[dict[str, Any]]) -> None:
    """Give every tool call an id of its own, and every answer the id of its call. Raises PromptError."""
    given = _make_ids_unique([call for message in messages for call in message.get("tool_calls") or ()])
    unanswered: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            del message["tool_calls"]
            call = _answered(message, unanswered, given, f"Message {number}")
            unanswered.remove(call)
            message["tool_call_id"] = call["id"]
        else:
            unanswered = list(message["tool_calls"] or ())


def _make_ids_unique(calls: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Give a new id to every call that has none, or one that an earlier call has. The result maps ids to those that
    the calls came with.
    """
    taken = {call["id"] for call in calls}
    fresh = (identity for identity in map(call_id, count(1)) if identity not in taken)
    came_with: dict[str, str] = {}
    for call in calls:
        identity = call["id"]
        if not identity or identity in came_with:
            call["id"] = next(fresh)
        came_with[call["id"]] = identity
    return came_with


def _answered(
    message: Message, unanswered: list[dict[str, Any]], given: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Find the call that a tool's message answers: the one with its id, else one that came without; of several, the
    one with its name, else the next. Raises PromptError.
    """
    if not unanswered:
        raise PromptError(f"{where} answers no tool call; put it after the assistant's message with `tool_calls`.")
    waiting, identity = unanswered, _identity(message, "tool_call_id", where)
    if identity:
        waiting = [call for call in unanswered if identity in (call["id"], given[call["id"]])]
        waiting = waiting or [call for call in unanswered if not given[call["id"]]]
    if not waiting:
        raise PromptError(
            f"{where} answers the tool call {identity!r}, which waits for no answer; give the `id` of one that does."
        )
    named = [call for call in waiting if call["function"]["name"] == message.get("name")]
    return (named or waiting)[0]


def _identity(mapping: Mapping[str, Any], key: str, where: str) -> str:
    """Read the id that a call or an answer carries; it is empty where there is none. Raises PromptError."""
    identity = mapping.get(key)
    if not isinstance(identity, str | None):
        raise PromptError(f"{where}: `{key}` must be text, not a {type(identity).__name__}.")
    return identity or ""


def _content(message: Message, role: str, where: str, sources: list[Any]) -> Any:
    """Check a message's content: text, or parts whose images and videos are added to `sources`."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if role == "tool" and "content" in message:
        if content is None or isinstance(content, bool | int | float):
            return content
        if isinstance(content, Mapping):
            return _json(content, where)
    if not isinstance(content, list | tuple):
        raise PromptError(
            f"{where}: `content` must be text or a list of parts, not a {type(content).__name__}."
            if "content" in message
            else f"{where} has no `content`."
        )
    return [_part(part, role, where, sources) for part in content]


def _json(content: Mapping[str, Any], where: str) -> str:
    """Write a tool's answer in fields as JSON: the hub's templates take a mapping for a list of parts."""
    try:
        return json.dumps(content, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{where}: the tool's answer cannot be written as JSON ({error}).") from None


def _part(part: Any, role: str, where: str, sources: list[Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url", "video", "video_url"):
        raise PromptError(
            f'{where} has a part that is none of {{"type": "text", "text": "…"}}, {{"type": "image"}} and '
            '{"type": "video", "video": …}; this model reads text and images, and videos frame by frame.'
        )
    if role not in ("user", "tool"):
        raise PromptError(f"{where}: only user and tool messages can hold images and videos.")
    if kind.startswith("image"):
        sources.append(_source(part, IMAGE_KEYS))
        return {"type": "image"}
    source = _source(part, VIDEO_KEYS)
    if source is None:
        raise PromptError(f'{where} has a video part without its video; write {{"type": "video", "video": "PATH"}}.')
    sources.append(VideoPart(source, part.get("frames"), part.get("fps")))
    return {"type": "image"}


def _source(part: Mapping[str, Any], keys: Sequence[str]) -> Any:
    source = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(source, Mapping):  # OpenAI's {"image_url": {"url": "…"}}
        source = source.get("url")
    if source is None and part.get("base64"):
        source = f"data:;base64,{part['base64']}"
    return source


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if calls and role != "assistant":
        raise PromptError(f"{where}: only the assistant can make tool calls.")
    if not isinstance(calls, list | tuple):
        raise PromptError(f"{where}: `tool_calls` must be a list, not a {type(calls).__name__}.")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Rewrite a tool call in OpenAI's form; its id is empty where it has none."""
    if isinstance(call, ToolCall):
        call = vars(call)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f'{where}: a tool call is {{"function": {{"name": …, "arguments": {{…}}}}}}.')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
            raise PromptError(f"{where}: the arguments of {function['name']!r} are not valid JSON.") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise PromptError(
            f"{where}: the arguments of {function['name']!r} must be an object that maps names to values."
        )
    identity = _identity(call, "id", where)
    return {"id": identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
