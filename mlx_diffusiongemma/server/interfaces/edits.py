"""Edits in place, as Mercury's clients ask for them: the next edit of a marked region of a file."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ...errors import PromptError
from ...events import Result
from ...filling.editing import edit
from ..answering import result_of
from ..fields import SamplingFields, caller_of, timings, usage
from ..service import Service
from ..work.waiting import Item, Job, Turn

UNCHANGED = "None"  # Mercury's word where nothing is to change
STRENGTH = 0.7  # the share of the region's tokens that start as noise
_TAGS = {
    name: re.compile(rf"<\|{name}\|>\n?(.*?)\n?<\|/{name}\|>", re.DOTALL)
    for name in ("recently_viewed_code_snippets", "current_file_content", "edit_diff_history")
}
_REGION = re.compile(r"(?P<open><\|code_to_edit\|>\n?)(?P<code>.*?)(?P<close>\n?<\|/code_to_edit\|>)", re.DOTALL)
_PATH = re.compile(r"^current_file_path: *(.*)\n")
_CURSOR = "<|cursor|>"


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

    @router.post("/v1/edit/completions")
    async def edit_completions(request: Request, body: EditBody) -> Response:
        """Propose the next edit of a file's region."""
        service.check_model(body.model)
        if body.stream:
            raise PromptError("`stream` cannot be honoured: an edit is certain all at once; leave it out.")
        region = read_region(_content(body.messages))
        result = await result_of(request, service.engine, await _edit(service, body, region, caller_of(request)))
        after = len(region.text) - region.span[1]
        code = result.text[region.span[0] : len(result.text) - after]
        content = UNCHANGED if code == region.code else f"```\n{code}\n```"
        return JSONResponse(_completion(service, content, result))

    return router


def _content(messages: list[dict[str, Any]]) -> str:
    content = messages[0].get("content") if len(messages) == 1 else None
    if not isinstance(content, str):
        raise PromptError("`messages` is one user message with the file and what to edit of it, as text.")
    return content


async def _edit(service: Service, body: EditBody, region: Region, caller: str) -> Job:
    options = service.canvas_options(body.sampling())
    asked = f"{region.instruction}\n\n{region.code}"
    prompt = await service.chat_prompt([{"role": "user", "content": asked}])
    options = service.checked(prompt, options)

    def work(turn: Turn) -> Generator[Item, None, None]:
        yield edit(
            turn.model,
            turn.processor,
            region.text,
            region.span,
            region.instruction,
            STRENGTH,
            options,
            cache=turn.cache,
            cancel=turn.cancel,
        )

    job = Job(work, prompt, caller, urgent=True)
    service.engine.submit(job)
    return job


def _completion(service: Service, content: str, result: Result) -> dict[str, Any]:
    return {
        "id": f"edit-{secrets.token_hex(12)}",
        "object": "edit.completion",
        "created": int(time.time()),
        "model": service.name,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": usage(result.stats),
        "timings": timings(result.stats),
    }
