"""Edits in place: a span of a text is written anew, or, as Mercury's clients ask, the marked region of a file."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from ...errors import PromptError
from ...events import Commit, Draft, Event, Result
from ...filling.editing import edit, unified_diff
from ...filling.gaps import text_tokens
from ...filling.infilling import Hole, infill
from ..answering import EventStream, data_frame, error_frame, items_of, result_of
from ..fields import SamplingFields, caller_of, diffusion_frame, finish_of, timings, usage
from ..service import Service
from ..work.waiting import Item, Job, Turn

UNCHANGED = "None"  # Mercury's word where nothing is to change
STRENGTH = 0.7  # how readily what the region holds goes
LEAST_ROOM = 16  # tokens for what fills a span, where twice as many as it held are fewer
_TAGS = {
    name: re.compile(rf"<\|{name}\|>\n?(.*?)\n?<\|/{name}\|>", re.DOTALL)
    for name in ("recently_viewed_code_snippets", "current_file_content", "edit_diff_history")
}
_REGION = re.compile(r"(?P<open><\|code_to_edit\|>\n?)(?P<code>.*?)(?P<close>\n?<\|/code_to_edit\|>)", re.DOTALL)
_PATH = re.compile(r"^current_file_path: *(.*)\n")
_CURSOR = "<|cursor|>"


class SpanBody(SamplingFields):
    """A request to write a span of `input` anew: as `instruction` says or, without one, so that it fits what is around.

    span: the first character and the one after the last, in Unicode characters. messages: the chat that `input` is the
    reply to. strength: how little it takes for a part of the span to go, 0 to 1; of instructions. frames: in a stream,
    a chunk for every denoising step beside the text that appends.
    """

    input: str
    span: tuple[int, int]
    instruction: str | None = None
    messages: list[dict[str, Any]] | None = None
    strength: float = Field(STRENGTH, gt=0, le=1)
    model: str | None = None
    stream: bool | None = False
    frames: bool = False

    @property
    def parts(self) -> tuple[str, str, str]:
        """The text before the span, in it and after it. Raises PromptError where there is no such span."""
        start, stop = self.span
        if not 0 <= start <= stop <= len(self.input) or (start == stop and self.instruction is not None):
            raise PromptError(
                f"`span` is {start} to {stop}, which cannot be written anew in an input of {len(self.input)} "
                "characters; give the first one and the one after the last."
            )
        return self.input[:start], self.input[start:stop], self.input[stop:]


class EditBody(SamplingFields):
    """A request for the next edit: one user message with Mercury's tags."""

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool | None = False


@dataclass(frozen=True)
class Region:
    """A file's text, without tags and cursor, and the span of it that is to be edited; what is known beside it."""

    text: str
    span: tuple[int, int]
    path: str
    snippets: str
    history: str

    @property
    def code(self) -> str:
        return self.text[slice(*self.span)]

    @property
    def instruction(self) -> str:
        """The request that the model reads."""
        parts = [
            self.snippets and f"Seen before:\n{self.snippets}",
            self.history and f"The last changes:\n{self.history}",
            f"Go on with the changes in this part of {self.path or 'the file'}.",
        ]
        return "\n\n".join(part for part in parts if part)


def read_region(content: str) -> Region:
    """Read Mercury's tags. Raises PromptError where there is no code to edit."""
    found = {name: match[1] if (match := tag.search(content)) else "" for name, tag in _TAGS.items()}
    file = found["current_file_content"] or content
    path = _PATH.match(file)
    file = file[path.end() :] if path else file
    region = _REGION.search(file)
    if region is None or not region["code"].replace(_CURSOR, ""):
        raise PromptError("The message has no code between <|code_to_edit|> and <|/code_to_edit|>; mark what to edit.")
    before = file[: region.start()].replace(_CURSOR, "")
    code = region["code"].replace(_CURSOR, "")
    text = before + code + file[region.end() :]
    span = (len(before), len(before) + len(code))
    return Region(
        text, span, path[1] if path else "", found["recently_viewed_code_snippets"], found["edit_diff_history"]
    )


def routes(service: Service) -> APIRouter:
    """Make the routes of this interface."""
    router = APIRouter(tags=["Edits"])

    @router.post("/v1/edits")
    async def edits(request: Request, body: SpanBody) -> Response:
        """Write a span of a text anew, in place; the rest stays as it is."""
        service.check_model(body.model)
        job = await _rewrite(service, body, caller_of(request))
        if body.stream:
            return EventStream(_frames(request, service, body, job))
        result = await result_of(request, service.engine, job)
        choice = _choice(result.text, finish_of(result, ()))
        return JSONResponse({**_head(service, "edit"), "choices": [choice], **_outcome(body, result)})

    @router.post("/v1/edit/completions")
    async def edit_completions(request: Request, body: EditBody) -> Response:
        """Propose the next edit of a file's region."""
        service.check_model(body.model)
        if body.stream:
            raise PromptError("`stream` cannot be honoured: an edit is certain all at once; leave it out.")
        region = read_region(_content(body.messages))
        span = SpanBody(input=region.text, span=region.span, instruction=region.instruction, **body.sampling())
        result = await result_of(request, service.engine, await _rewrite(service, span, caller_of(request)))
        after = len(region.text) - region.span[1]
        code = result.text[region.span[0] : len(result.text) - after]
        content = UNCHANGED if code == region.code else f"```\n{code}\n```"
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return JSONResponse({**_head(service, "edit.completion"), "choices": [choice], **_counted(result)})

    return router


def _content(messages: list[dict[str, Any]]) -> str:
    content = messages[0].get("content") if len(messages) == 1 else None
    if not isinstance(content, str):
        raise PromptError("`messages` is one user message with the file and what to edit of it, as text.")
    return content


async def _rewrite(service: Service, body: SpanBody, caller: str) -> Job:
    """Queue an edit, which may run between two canvases of a chat. Raises Refusal and PromptError."""
    before, own, after = body.parts
    options = service.canvas_options(body.sampling())
    chat = body.messages or []
    if body.instruction is not None:
        asked = {"role": "user", "content": f"{body.instruction}\n\n{own}"}
        said = [*chat, {"role": "assistant", "content": body.input}] if chat else []
        prompt = await service.chat_prompt([*said, asked])
    elif chat:
        prompt = await service.chat_prompt(chat)
    else:
        prompt = await service.prompt(lambda processor: processor.raw_prompt(before))
    options = service.checked(prompt, options)
    longest = service.engine.loaded.model.config.canvas_length * 3 // 4

    def tell(event: Event) -> None:
        if isinstance(event, Draft | Commit):
            job.hand_over(event)

    def work(turn: Turn) -> Generator[Item, None, None]:
        if body.instruction is None:
            room = max(2 * len(text_tokens(turn.processor, own)), LEAST_ROOM)
            parts = [part for part in (before, Hole(min(room, longest)), after) if part]
            yield infill(
                turn.model,
                turn.processor,
                parts,
                prompt if chat else None,
                options,
                cache=turn.cache,
                cancel=turn.cancel,
                on_event=tell,
            )
            return
        yield edit(
            turn.model,
            turn.processor,
            body.input,
            body.span,
            prompt,
            body.strength,
            options,
            cache=turn.cache,
            cancel=turn.cancel,
            on_event=tell,
        )

    job = Job(work, prompt, caller, drafts=body.frames, urgent=True)
    service.engine.submit(job)
    return job


async def _frames(request: Request, service: Service, body: SpanBody, job: Job) -> AsyncGenerator[str, None]:
    """Write the whole text chunk by chunk, as it becomes certain, and how it went at last."""
    head = _head(service, "edit.chunk")
    try:
        async with aclosing(items_of(request, service.engine, job)) as items:
            async for item in items:
                match item:
                    case Draft():
                        yield data_frame({**head, "choices": [], **diffusion_frame(item), "holes": item.holes})
                    case Commit():
                        yield data_frame({**head, "choices": [_choice(item.text)]})
                    case Result():
                        outcome = _outcome(body, item)
                        yield data_frame({**head, "choices": [_choice("", finish_of(item, ()))], **outcome})
    except Exception as error:
        yield error_frame(request, error)
        return
    yield "data: [DONE]\n\n"


def _choice(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": finish}


def _outcome(body: SpanBody, result: Result) -> dict[str, Any]:
    """Tell what changed, and what it cost."""
    diff = unified_diff(body.input, result.text)
    return {"diff": diff, "seed": result.seed, **_counted(result)}


def _counted(result: Result) -> dict[str, Any]:
    return {"usage": usage(result.stats), "timings": timings(result.stats)}


def _head(service: Service, kind: str) -> dict[str, Any]:
    identity = f"edit-{secrets.token_hex(12)}"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": service.name}
