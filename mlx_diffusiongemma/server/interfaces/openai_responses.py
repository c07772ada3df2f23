"""OpenAI's responses, without state: the whole conversation comes with every request."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ...errors import PromptError
from ...events import Commit, Done
from ..answering import EventStream, data_frame, items_of, whole
from ..fields import SamplingFields, caller_of, chosen_tool, is_thinking, pieces_of, schema_of
from ..refusals import as_refusal
from ..service import Form, Service
from ..work.waiting import Job
from .responses_input import chat_messages, function_schemas
from .responses_output import ResponseWriter


class ResponsesBody(SamplingFields):
    """A request for a response."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    model: str | None = None
    stream: bool | None = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    max_output_tokens: int | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = False
    metadata: dict[str, str] | None = None


def routes(service: Service) -> APIRouter:
    """Make the routes of this interface."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/responses")
    async def responses(request: Request, body: ResponsesBody) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        _check(body)
        form = Form(schema_of((body.text or {}).get("format"), "text.format"), chosen_tool(body.tool_choice))
        tools = [] if body.tool_choice == "none" else function_schemas(body.tools or [])
        thinking = is_thinking((body.reasoning or {}).get("effort"))
        prompt = await service.chat_prompt(chat_messages(body.instructions, body.input), tools, thinking)
        options = service.request_options({**body.sampling(), "max_tokens": body.max_output_tokens}, form)
        job = await service.reply(prompt, options, caller_of(request), form=form)
        echoed = {
            "model": service.name,
            "instructions": body.instructions,
            "tools": [tool for tool in body.tools or [] if tool.get("type") == "function"],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "temperature": body.temperature,
            "top_p": body.top_p,
        }
        writer = ResponseWriter(echoed, service.engine.loaded.processor)
        if body.stream:
            return EventStream(_frames(request, service, job, writer))
        await whole(request, _write(request, service, job, writer))
        return JSONResponse(writer.response)

    return router


def _check(body: ResponsesBody) -> None:
    for name, value in (
        ("previous_response_id", body.previous_response_id),
        ("conversation", body.conversation),
        ("background", body.background),
    ):
        if value:
            raise PromptError(f"`{name}` cannot be honoured: nothing is stored here; send the whole conversation.")


async def _write(request: Request, service: Service, job: Job, writer: ResponseWriter) -> None:
    async for _ in _events(request, service, job, writer):
        pass


async def _frames(request: Request, service: Service, job: Job, writer: ResponseWriter) -> AsyncGenerator[str, None]:
    try:
        async with aclosing(_events(request, service, job, writer)) as events:
            async for event in events:
                yield data_frame(event, event["type"])
    except Exception as error:
        event = writer.fail(as_refusal(error))
        yield data_frame(event, event["type"])


async def _events(
    request: Request, service: Service, job: Job, writer: ResponseWriter
) -> AsyncGenerator[dict[str, Any], None]:
    for event in writer.start():
        yield event
    async with aclosing(items_of(request, service.engine, job)) as items:
        async for item in items:
            if isinstance(item, Commit):
                for piece in pieces_of(item):
                    for event in writer.add(piece):
                        yield event
            elif isinstance(item, Done):
                for event in writer.end(item):
                    yield event
