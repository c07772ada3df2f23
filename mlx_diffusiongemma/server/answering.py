"""Answers on their way out: whole or as server-sent events, for as long as somebody waits for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..events import Commit, Done, Result, Stats
from ..generation.replying import collect
from .fields import Piece, pieces_of
from .refusals import Refusal, as_refusal
from .work.engine import LOG, Engine
from .work.waiting import Item, Job

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

PING_SECONDS = 10.0  # clients take a silence of 15 to 20 s for a broken connection

T = TypeVar("T")


class EventStream(Response):
    """Server-sent events as `frames` yields them, with `ping` in silences. A disconnect closes `frames` at once."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[str, None], ping: str = ": ping\n\n") -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.frames, self.ping = frames, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.create_task(_disconnected(receive))
        upcoming: asyncio.Task[str | None] | None = None
        try:
            while not gone.done():
                upcoming = upcoming or asyncio.create_task(_following(self.frames))
                await asyncio.wait({upcoming, gone}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    break
                frame: str | None = self.ping
                if upcoming.done():
                    frame, upcoming = upcoming.result(), None
                await send({"type": "http.response.body", "body": (frame or "").encode(), "more_body": bool(frame)})
                if frame is None:
                    break
        except OSError:  # the connection broke while something was sent
            pass
        finally:
            await _stop(gone)
            if upcoming:
                await _stop(upcoming)
            await self.frames.aclose()


async def whole(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Wait for an answer as long as the caller does. Raises Refusal where they have gone."""
    gone = asyncio.create_task(_disconnected(request.receive))
    working = asyncio.create_task(answer)
    try:
        await asyncio.wait({gone, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal("The caller has gone.", 499)
        return working.result()
    finally:
        await _stop(gone)
        await _stop(working)


async def result_of(request: Request, engine: Engine, job: Job) -> Result:
    """The whole result of a submitted job. Raises what went wrong."""

    async def gathered() -> Result:
        kept: list[Commit | Done] = []
        async with aclosing(engine.items(job)) as items:
            async for item in items:
                if isinstance(item, Result):
                    return item
                if isinstance(item, Commit | Done):
                    kept.append(item)
        return collect(kept)

    result = await whole(request, gathered())
    take_note(request, result.stats)
    return result


async def items_of(request: Request, engine: Engine, job: Job) -> AsyncGenerator[Item, None]:
    """The items of a submitted job, of which the log line will tell the cost."""
    async with aclosing(engine.items(job)) as items:
        async for item in items:
            if isinstance(item, Done | Result):
                take_note(request, item.stats)
            yield item


def take_note(request: Request, stats: Stats) -> None:
    """Say in the log line of a request what it cost."""
    request.scope["notes"].update(
        prompt=stats.prompt_tokens,
        cached=stats.cached_tokens,
        generated=stats.generated_tokens,
        steps=sum(stats.steps),
    )


def data_frame(body: dict[str, Any], event: str | None = None) -> str:
    """One server-sent event. Clients look for `data: ` with its space."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def refused(request: Request, error: Exception) -> JSONResponse:
    """Answer a request with what went wrong."""
    refusal = as_refusal(error)
    return JSONResponse(refusal.body(request.url.path), refusal.status, refusal.headers)


def error_frame(request: Request, error: Exception) -> str:
    """Say in a stream that has begun what went wrong; the log gets what no user should see."""
    return data_frame(_noticed(error).body(request.url.path))


def _noticed(error: Exception) -> Refusal:
    refusal = as_refusal(error)
    if refusal.status == 500:
        LOG.error("a request failed", exc_info=error)
    return refusal


class EventWriter(Protocol):
    """Writes a reply in the form of an interface, whose events, each with a `type`, tell of every addition to it."""

    def start(self) -> Iterator[dict[str, Any]]: ...

    def add(self, piece: Piece) -> Iterator[dict[str, Any]]: ...

    def end(self, done: Done) -> Iterator[dict[str, Any]]: ...

    def fail(self, refusal: Refusal) -> dict[str, Any]: ...


async def write(request: Request, engine: Engine, job: Job, writer: EventWriter) -> None:
    """Let `writer` write the reply of a submitted job. Raises what went wrong."""

    async def written() -> None:
        async for _ in _events(request, engine, job, writer):
            pass

    await whole(request, written())


async def frames_of(request: Request, engine: Engine, job: Job, writer: EventWriter) -> AsyncGenerator[str, None]:
    """The events of a reply as `writer` writes it, and the one that says what went wrong, as server-sent events."""
    try:
        async with aclosing(_events(request, engine, job, writer)) as events:
            async for event in events:
                yield data_frame(event, event["type"])
    except Exception as error:
        event = writer.fail(_noticed(error))
        yield data_frame(event, event["type"])


async def _events(
    request: Request, engine: Engine, job: Job, writer: EventWriter
) -> AsyncGenerator[dict[str, Any], None]:
    for event in writer.start():
        yield event
    async with aclosing(items_of(request, engine, job)) as items:
        async for item in items:
            if isinstance(item, Commit):
                for piece in pieces_of(item):
                    for event in writer.add(piece):
                        yield event
            elif isinstance(item, Done):
                for event in writer.end(item):
                    yield event


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _following(frames: AsyncGenerator[str, None]) -> str | None:
    return await anext(frames, None)


async def _stop(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
