"""Anthropic's messages and tools as the chat messages and schemas that prompts are made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import PromptError

# Claude Code's own line about a request, with a number that changes each time: no kept prefix would match any more.
_BILLING = re.compile(r"^x-anthropic-billing-header:.*(?:\n|$)", re.MULTILINE)


def chat_messages(system: str | Sequence[dict[str, Any]] | None, messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Rewrite a conversation. Raises PromptError where it holds what this model does not read."""
    instructions = _BILLING.sub("", _text(system or "", "`system`"))
    made = [{"role": "system", "content": instructions}] if instructions.strip() else []
    for number, message in enumerate(messages, 1):
        where = f"Message {number}"
        role, content = message.get("role"), message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise PromptError(f"{where}: `content` must be text or a list of blocks.")
        if role == "assistant":
            made.append(_assistant(blocks, where))
        elif role == "system":
            made.append({"role": "system", "content": _BILLING.sub("", _text(blocks, where))})
        else:
            made += _user(role, blocks, where)
    if made and made[-1]["role"] == "assistant":
        raise PromptError("The last message is the assistant's, and a reply cannot be begun for it; end with a user's.")
    return made


def function_schemas(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rewrite tools; those that a server of Anthropic's would run itself are left out."""
    own = [tool for tool in tools if tool.get("type", "custom") == "custom"]
    return [
        {
            "type": "function",
            "function": {
                "name": tool.get("name"),
                "description": tool.get("description") or "",
                "parameters": tool.get("input_schema") or {},
                "strict": tool.get("strict"),
            },
        }
        for tool in own
    ]


def _assistant(blocks: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning": "", "tool_calls": []}
    for block in blocks:
        match block.get("type"):
            case "text":
                message["content"] += str(block.get("text", ""))
            case "thinking":
                message["reasoning"] += str(block.get("thinking", ""))
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input")}
                message["tool_calls"].append({"id": block.get("id"), "function": function})
            case "redacted_thinking":
                pass
            case kind:
                raise _unreadable(where, kind)
    return message


def _user(role: Any, blocks: Sequence[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """Tools' answers are messages of their own, and come before what the user says beside them."""
    parts: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            content = block.get("content") or ""
            parts_of = content if isinstance(content, str) else [_part(part, where) for part in content]
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": parts_of}
        else:
            parts.append(_part(block, where))
    if parts:
        texts = all(part["type"] == "text" for part in parts)
        yield {"role": role, "content": "\n".join(part["text"] for part in parts) if texts else parts}


def _part(block: Any, where: str) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return {"type": "text", "text": block["text"]}
    source = block.get("source") if kind == "image" else None
    if not isinstance(source, dict):
        raise _unreadable(where, kind)
    if source.get("type") == "base64":
        return {"type": "image", "image": f"data:{source.get('media_type', '')};base64,{source.get('data', '')}"}
    return {"type": "image", "image": str(source.get("url"))}


def _text(content: str | Sequence[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    if not all(isinstance(block.get("text"), str) for block in content):
        raise PromptError(f"{where} must be text.")
    return "\n".join(block["text"] for block in content)


def _unreadable(where: str, kind: Any) -> PromptError:
    return PromptError(f"{where} has a block of type {kind!r}; this model reads text, images, tool calls and answers.")
