"""The conversation in a request for a response, as the chat messages and schemas that prompts are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import PromptError


def chat_messages(instructions: str | None, given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rewrite a conversation. Calls that follow one another belong to one message, as does the text before them.
    Raises PromptError where it holds what this model does not read.
    """
    made: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*made, {"role": "user", "content": given}]
    for number, item in enumerate(given, 1):
        where = f"Item {number} of `input`"
        match item.get("type", "message"):
            case "message":
                made.append({"role": item.get("role"), "content": _content(item.get("content"), where)})
            case "function_call":
                if not made or made[-1]["role"] != "assistant":
                    made.append({"role": "assistant", "content": ""})
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                made[-1].setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
            case "function_call_output":
                content = _content(item.get("output"), where)
                made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
            case "reasoning":
                pass  # of earlier turns, which the model does not read again
            case kind:
                raise PromptError(f"{where} is of type {kind!r}; messages, function calls and their outputs are known.")
    return made


def function_schemas(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rewrite the functions among tools; those of other types are the provider's own, and left out."""
    functions = [tool for tool in tools if tool.get("type") == "function"]
    names = ("name", "description", "parameters", "strict")
    return [{"type": "function", "function": {name: tool.get(name) for name in names}} for tool in functions]


def _content(content: Any, where: str) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError(f"{where} has no text.")
    parts = [_part(part, where) for part in content]
    return "".join(part["text"] for part in parts) if all(part["type"] == "text" for part in parts) else parts


def _part(part: Any, where: str) -> dict[str, Any]:
    match part.get("type") if isinstance(part, dict) else None:
        case "input_text" | "output_text" | "text" if isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        case "refusal" if isinstance(part.get("refusal"), str):
            return {"type": "text", "text": part["refusal"]}
        case "input_image" if isinstance(part.get("image_url"), str):
            return {"type": "image", "image": part["image_url"]}
        case kind:
            raise PromptError(f"{where} has a part of type {kind!r}; this model reads text and images.")
