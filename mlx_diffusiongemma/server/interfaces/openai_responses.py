"""OpenAI's responses, without state: the whole conversation comes with every request."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ...errors import PromptError
from ..answering import EventStream, frames_of, write
from ..fields import SamplingFields, caller_of, chosen_tool, is_thinking, schema_of
from ..service import Form, Service
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
            return EventStream(frames_of(request, service.engine, job, writer))
        await write(request, service.engine, job, writer)
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
