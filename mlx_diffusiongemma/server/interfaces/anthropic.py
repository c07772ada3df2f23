"""Anthropic's messages."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from ...events import Done, Stats, ToolCall
from ...processing.processor import Prompt
from ..answering import EventStream, data_frame, frames_of, write
from ..fields import Piece, SamplingFields, caller_of, chosen_tool, schema_of
from ..refusals import MESSAGES, Refusal
from ..service import Form, Service
from .anthropic_messages import chat_messages, function_schemas

PING = data_frame({"type": "ping"}, "ping")  # comments are not enough for its clients


class CountBody(BaseModel):
    """Messages whose tokens are to be counted."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    model: str | None = None

    @property
    def format(self) -> Any:
        """The form that the reply must have, under its newer name or its older one."""
        return (self.output_config or {}).get("format") or self.output_format

    @property
    def choice(self) -> Any:
        """The tool to call, in OpenAI's words."""
        match self.tool_choice or {"type": "auto"}:
            case {"type": "any"}:
                return "required"
            case {"type": "tool", "name": name}:
                return {"type": "function", "name": name}
            case {"type": kind}:
                return kind
        return self.tool_choice


class MessagesBody(CountBody, SamplingFields):
    """A request for a message."""

    max_tokens: int
    stream: bool | None = False
    stop_sequences: list[str] | None = None


def routes(service: Service) -> APIRouter:
    """Make the routes of this interface."""
    router = APIRouter(tags=["Anthropic"])

    @router.post("/v1/messages")
    async def messages(request: Request, body: MessagesBody) -> Response:
        """Answer messages."""
        prompt = await _prompt(service, body)
        stops = tuple(text for text in body.stop_sequences or () if text)
        form = Form(schema_of(body.format, "output_config.format"), chosen_tool(body.choice))
        options = service.request_options({**body.sampling(), "max_tokens": body.max_tokens, "stop": stops}, form)
        job = await service.reply(prompt, options, caller_of(request), form=form)
        message = MessageWriter(service.name, len(prompt.tokens))
        if body.stream:
            return EventStream(frames_of(request, service.engine, job, message), PING)
        await write(request, service.engine, job, message)
        return JSONResponse(message.content)

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountBody) -> dict[str, int]:
        """Count the tokens that the model would read."""
        return {"input_tokens": len((await _prompt(service, body)).tokens)}

    return router


async def _prompt(service: Service, body: CountBody) -> Prompt:
    service.check_model(body.model)
    tools = [] if body.choice == "none" else function_schemas(body.tools or [])
    thinking = (body.thinking or {}).get("type", "disabled") != "disabled"
    return await service.chat_prompt(chat_messages(body.system, body.messages), tools, thinking)


class MessageWriter:
    """Writes a message: `content` as it is so far, and the events that tell of each addition to it.

    A block begins where the kind of text changes; a tool call is one whole block.
    """

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.content: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self.blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
        }

    def start(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": {**self.content, "content": []}}

    def add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Add a piece of the reply."""
        if isinstance(piece, ToolCall):
            block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            yield from self._begin(block)
            yield self._delta("input_json_delta", "partial_json", json.dumps(piece.arguments, ensure_ascii=False))
            block["input"] = piece.arguments
            return
        kind, text = piece
        if not self.blocks or self.blocks[-1]["type"] != kind:
            signature = {"signature": ""} if kind == "thinking" else {}
            yield from self._begin({"type": kind, kind: "", **signature})
        self.blocks[-1][kind] += text
        yield self._delta(f"{kind}_delta", kind, text)

    def end(self, done: Done) -> Iterator[dict[str, Any]]:
        """End the reply."""
        if self.blocks:
            yield self._stop()
        called = any(block["type"] == "tool_use" for block in self.blocks)
        reason = "max_tokens" if done.finish_reason == "length" else "tool_use" if called else "end_turn"
        if done.stop_string is not None:
            reason = "stop_sequence"
        ending = {"stop_reason": reason, "stop_sequence": done.stop_string}
        self.content |= {**ending, "usage": _usage(done.stats)}
        yield {
            "type": "message_delta",
            "delta": ending,
            "usage": self.content["usage"],
        }
        yield {"type": "message_stop"}

    def fail(self, refusal: Refusal) -> dict[str, Any]:
        """Say what went wrong."""
        return refusal.body(MESSAGES)

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self.blocks:
            yield self._stop()
        self.blocks.append(block)
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, kind: str, name: str, text: str) -> dict[str, Any]:
        delta = {"type": kind, name: text}
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _stop(self) -> dict[str, Any]:
        return {"type": "content_block_stop", "index": len(self.blocks) - 1}


def _usage(stats: Stats) -> dict[str, int]:
    return {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_read_input_tokens": stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": stats.generated_tokens,
    }
