"""OpenAI's chat completions, with what a canvas has to show: drafts that replace each other, or a frame per step."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ...errors import PromptError
from ...events import Commit, Done, Draft, Result, ToolCall
from ...generation.canvas import Canvas
from ..answering import EventStream, data_frame, error_frame, items_of, result_of
from ..fields import (
    SamplingFields,
    caller_of,
    chosen_tool,
    diffusion_frame,
    finish_of,
    is_thinking,
    pieces_of,
    schema_of,
    stops_of,
    timings,
    usage,
)
from ..service import Form, Service
from ..work.waiting import Job


class ChatBody(SamplingFields):
    """A request for a chat completion.

    diffusing: each delta holds the whole text so far, to replace what came before, a draft of every step. frames: a
    chunk with an empty delta for every step, beside the deltas that append.
    """

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    n: int | None = 1
    logprobs: bool | None = False
    diffusing: bool = False
    frames: bool = False

    @property
    def thinking(self) -> bool:
        named = (self.chat_template_kwargs or {}).get("enable_thinking")
        return is_thinking(self.reasoning_effort) if named is None else bool(named)

    @property
    def wants_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


@dataclass
class _Asked:
    """A chat completion on its way. predicted: the tokens of the prediction that it starts from."""

    request: Request
    service: Service
    body: ChatBody
    job: Job
    predicted: list[int] | None
    identity: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        head = {"id": self.identity, "object": "chat.completion.chunk", "created": self.created}
        return data_frame({**head, "model": self.service.name, "choices": choices, **more})

    def delta(self, content: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        return self.chunk([{"index": 0, "delta": content, "logprobs": None, "finish_reason": finish}], **more)

    def predictions(self, tokens: list[int]) -> tuple[int, int] | None:
        """Count the tokens of the prediction that are in the reply, in order, and those that are not."""
        if self.predicted is None:
            return None
        blocks = SequenceMatcher(None, self.predicted, tokens, autojunk=False).get_matching_blocks()
        accepted = sum(block.size for block in blocks)
        return accepted, len(self.predicted) - accepted


def routes(service: Service) -> APIRouter:
    """Make the routes of this interface."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Answer chat messages."""
        asked = await _ask(request, service, body)
        if body.stream:
            return EventStream(_frames(asked))
        return JSONResponse(_completion(asked, await result_of(request, service.engine, asked.job)))

    return router


async def _ask(request: Request, service: Service, body: ChatBody) -> _Asked:
    service.check_model(body.model)
    form = Form(schema_of(body.response_format, "response_format"), chosen_tool(body.tool_choice))
    if body.n not in (None, 1) or body.logprobs:
        field = "logprobs" if body.logprobs else "n"
        raise PromptError(f"`{field}` cannot be honoured: there is one reply, without probabilities; leave it out.")
    if body.diffusing and not body.stream:
        raise PromptError("`diffusing` shows drafts as they come; set `stream` to true too.")
    most = body.max_completion_tokens or body.max_tokens
    options = service.request_options({**body.sampling(), "max_tokens": most, "stop": stops_of(body.stop)}, form)
    tools = [] if body.tool_choice == "none" else body.tools or []
    prompt = await service.chat_prompt(body.messages, tools, body.thinking)
    predicted = _prediction(service, body.prediction)
    canvas = Canvas(predicted) if predicted and options.decoder == "diffusion" and not form else None
    drafts = body.diffusing or body.frames
    job = await service.reply(prompt, options, caller_of(request), drafts=drafts, canvas=canvas, form=form)
    return _Asked(request, service, body, job, predicted if canvas else None)


def _prediction(service: Service, prediction: dict[str, Any] | None) -> list[int] | None:
    """The tokens of the text that the caller expects."""
    if prediction is None:
        return None
    content = prediction.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise PromptError('`prediction` is {"type": "content", "content": "TEXT"}; its content is no text.')
    return service.engine.loaded.processor.tokenizer.encode(content, add_special_tokens=False)


def _completion(asked: _Asked, result: Result) -> dict[str, Any]:
    """Write the whole reply."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    if result.thinking:
        message |= {"reasoning": result.thinking, "reasoning_content": result.thinking}
    if result.tool_calls:
        message["tool_calls"] = [_call(call) for call in result.tool_calls]
        message["content"] = result.text or None
    finish = finish_of(result, result.tool_calls)
    return {
        "id": asked.identity,
        "object": "chat.completion",
        "created": asked.created,
        "model": asked.service.name,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": usage(result.stats, asked.predictions(result.tokens)),
        "timings": timings(result.stats),
    }


async def _frames(asked: _Asked) -> AsyncGenerator[str, None]:
    """Write the reply chunk by chunk."""
    whole = ""
    tokens: list[int] = []
    calls: list[ToolCall] = []
    done: Done | None = None
    yield asked.delta({"role": "assistant", "content": ""})
    try:
        async with aclosing(items_of(asked.request, asked.service.engine, asked.job)) as items:
            async for item in items:
                match item:
                    case Draft() if asked.body.diffusing:
                        yield asked.delta({"content": whole + item.text})
                    case Draft():
                        yield asked.delta({}, **diffusion_frame(item))
                    case Commit():
                        tokens += item.tokens
                        for piece in pieces_of(item):
                            if isinstance(piece, ToolCall):
                                yield asked.delta({"tool_calls": [{"index": len(calls), **_call(piece)}]})
                                calls.append(piece)
                            elif piece[0] == "thinking":
                                yield asked.delta({"reasoning": piece[1], "reasoning_content": piece[1]})
                            else:
                                whole += piece[1]
                                yield asked.delta({"content": whole if asked.body.diffusing else piece[1]})
                    case Done():
                        done = item
    except Exception as error:
        yield error_frame(asked.request, error)
        return
    if done is None:
        return
    yield asked.delta({}, finish_of(done, calls), timings=timings(done.stats), seed=done.seed)
    if asked.body.wants_usage:
        yield asked.chunk([], usage=usage(done.stats, asked.predictions(tokens)), timings=timings(done.stats))
    yield "data: [DONE]\n\n"


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
