"""Chat messages in the one form that every published chat template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import PromptError
from .events import ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")
# Where pictures may stand in for the source of an image: Transformers' spellings and OpenAI's.
IMAGE_KEYS = ("image", "url", "path", "image_url")

Message = Mapping[str, Any]


def normalize_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any]]:
    """New messages, checked, and the source of every image part in order; None where `images` has to fill it.

    `model` becomes `assistant`; tool calls become `{"type": "function", "function": {"name", "arguments"}}` with a
    mapping for arguments; image parts become `{"type": "image"}`. Raises PromptError.
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
        if role == "tool" and not (normal and (normal[-1]["role"] == "tool" or normal[-1].get("tool_calls"))):
            raise PromptError(f"{where} answers no tool call; put it after the assistant's message with `tool_calls`.")
        normal.append({**message, "role": role, "content": _content(message, role, where, sources)})
        if message.get("tool_calls"):
            normal[-1]["tool_calls"] = _tool_calls(message["tool_calls"], role, where)
        for key in ("reasoning", "reasoning_content"):
            if not isinstance(message.get(key) or "", str):
                raise PromptError(f"{where}: `{key}` must be text, not a {type(message[key]).__name__}.")
    if not normal:
        raise PromptError("There are no messages; give at least one.")
    return normal, sources


def _content(message: Message, role: str, where: str, sources: list[Any]) -> Any:
    """A message's content: text, or text and image parts whose sources are added to `sources`."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if role == "tool" and isinstance(content, Mapping | bool | int | float):
        return content  # an answer in the tool's own words
    if not isinstance(content, list | tuple):
        raise PromptError(
            f"{where}: `content` must be text or a list of parts, not a {type(content).__name__}."
            if "content" in message
            else f"{where} has no `content`."
        )
    return [_part(part, role, where, sources) for part in content]


def _part(part: Any, role: str, where: str, sources: list[Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise PromptError(
            f'{where} has a part that is neither {{"type": "text", "text": "…"}} nor {{"type": "image"}}; '
            "this model reads text and images."
        )
    if role not in ("user", "tool"):
        raise PromptError(f"{where}: only user and tool messages can hold images.")
    source = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
    if isinstance(source, Mapping):  # OpenAI's {"image_url": {"url": "…"}}
        source = source.get("url")
    if source is None and part.get("base64"):
        source = f"data:;base64,{part['base64']}"
    sources.append(source)
    return {"type": "image"}


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise PromptError(f"{where}: only the assistant can make tool calls.")
    if not isinstance(calls, list | tuple):
        raise PromptError(f"{where}: `tool_calls` must be a list, not a {type(calls).__name__}.")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        call = {"name": call.name, "arguments": call.arguments}
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f'{where}: a tool call is {{"function": {{"name": …, "arguments": {{…}}}}}}.')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (json.JSONDecodeError, RecursionError):
            raise PromptError(f"{where}: the arguments of {function['name']!r} are not valid JSON.") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise PromptError(
            f"{where}: the arguments of {function['name']!r} must be an object that maps names to values."
        )
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
