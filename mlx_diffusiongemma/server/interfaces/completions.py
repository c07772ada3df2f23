"""OpenAI's and Mistral's completions: a text goes on, or what is missing in its middle is filled in."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from ...errors import PromptError
from ...events import Commit, Done, Result
from ..answering import EventStream, data_frame, error_frame, items_of, result_of
from ..fields import SamplingFields, caller_of, finish_of, stops_of, timings, usage
from ..middles import Middle, fill_middle, filled_text, find_middle
from ..service import Service
from ..work.waiting import Job


class CompletionBody(SamplingFields):
    """A request for the completion of a text; with a suffix, or markers inside the prompt, for its middle."""

    prompt: str | list[str] | list[int]
    suffix: str | None = None
    model: str | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    n: int | None = 1
    best_of: int | None = 1
    logprobs: int | None = None
    echo: bool | None = False

    @property
    def wants_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class Head(BaseModel):
    """The fields that a completion and all of its chunks begin with."""

    id: str
    object: str
    created: int
    model: str


def routes(service: Service) -> APIRouter:
    """Make the routes of this interface."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Continue a text, or fill in its middle."""
        text = _checked(body)
        middle = find_middle(text, body.suffix) if isinstance(text, str) else None
        if middle:
            return await _answer_middle(request, service, body, middle)
        service.check_model(body.model)
        given = {**body.sampling(), "max_tokens": body.max_tokens, "stop": stops_of(body.stop)}
        prompt = await service.prompt(
            lambda processor: processor.raw_prompt(text) if isinstance(text, str) else processor.prompt(text)
        )
        job = await service.reply(prompt, service.request_options(given), caller_of(request))
        head = _head(service)
        if body.stream:
            return EventStream(_continued(request, service, body, job, head))
        return _completion(head, (result := await result_of(request, service.engine, job)), result.text)

    @router.post("/v1/fim/completions")
    async def fim_completions(request: Request, body: CompletionBody) -> Response:
        """Fill in the middle of a text, or its end."""
        text = _checked(body)
        if not isinstance(text, str):
            raise PromptError("`prompt` holds token ids; a middle is filled between texts.")
        return await _answer_middle(request, service, body, find_middle(text, body.suffix or "") or (text, ""))

    return router


def _checked(body: CompletionBody) -> str | list[int]:
    for name, value, only in (("n", body.n, 1), ("best_of", body.best_of, 1), ("echo", body.echo, False)):
        if value not in (None, only):
            raise PromptError(
                f"`{name}` cannot be honoured: there is one completion, without the prompt; leave it out."
            )
    if body.logprobs is not None:
        raise PromptError("`logprobs` cannot be honoured: there are no probabilities; leave it out.")
    if isinstance(body.prompt, str):
        return body.prompt
    numbers = [part for part in body.prompt if isinstance(part, int)]
    texts = [part for part in body.prompt if isinstance(part, str)]
    if len(texts) > 1:
        raise PromptError("`prompt` holds several texts; send a request for each.")
    return texts[0] if texts else numbers


def _head(service: Service) -> Head:
    identity = f"cmpl-{secrets.token_hex(12)}"
    return Head(id=identity, object="text_completion", created=int(time.time()), model=service.name)


def _choice(text: str, finish: str | None, **more: Any) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, **more}


def _completion(head: Head, result: Result, text: str, **more: Any) -> JSONResponse:
    choice = _choice(text, finish_of(result, ()), **more)
    counted = {"usage": usage(result.stats), "timings": timings(result.stats)}
    return JSONResponse({**dict(head), "choices": [choice], **counted})


async def _answer_middle(request: Request, service: Service, body: CompletionBody, middle: tuple[str, str]) -> Response:
    """Fill a middle. Its choice has the text in every place where a client may look for it."""
    service.check_model(body.model)
    stops = stops_of(body.stop)
    wanted = Middle(*middle, tokens=body.max_tokens, stops=stops)
    job = await fill_middle(service, wanted, service.canvas_options(body.sampling()), caller_of(request))
    head = _head(service)
    if body.stream:
        return EventStream(_filled(request, service, body, job, head))
    result = await result_of(request, service.engine, job)
    text = filled_text(result, stops)
    return _completion(head, result, text, message={"role": "assistant", "content": text})


async def _continued(
    request: Request, service: Service, body: CompletionBody, job: Job, head: Head
) -> AsyncGenerator[str, None]:
    """Write a continuation chunk by chunk."""
    try:
        async with aclosing(items_of(request, service.engine, job)) as items:
            async for item in items:
                match item:
                    case Commit() if item.text:
                        yield data_frame({**dict(head), "choices": [_choice(item.text, None)]})
                    case Done():
                        for frame in _ending(head, body, item, _choice("", finish_of(item, ()))):
                            yield frame
    except Exception as error:
        yield error_frame(request, error)


async def _filled(
    request: Request, service: Service, body: CompletionBody, job: Job, head: Head
) -> AsyncGenerator[str, None]:
    """Write what fills a middle: one chunk, for it is certain all at once."""
    try:
        async with aclosing(items_of(request, service.engine, job)) as items:
            async for item in items:
                if isinstance(item, Result):
                    text = filled_text(item, stops_of(body.stop))
                    choice = _choice(text, None, delta={"role": "assistant", "content": text})
                    yield data_frame({**dict(head), "choices": [choice]})
                    for frame in _ending(head, body, item, _choice("", finish_of(item, ()), delta={})):
                        yield frame
    except Exception as error:
        yield error_frame(request, error)


def _ending(head: Head, body: CompletionBody, done: Done | Result, choice: dict[str, Any]) -> list[str]:
    """The last chunks of a stream."""
    counted = {"usage": usage(done.stats), "timings": timings(done.stats)}
    frames = [data_frame({**dict(head), "choices": [choice], "timings": timings(done.stats)})]
    if body.wants_usage:
        frames.append(data_frame({**dict(head), "choices": [], **counted}))
    return [*frames, "data: [DONE]\n\n"]
