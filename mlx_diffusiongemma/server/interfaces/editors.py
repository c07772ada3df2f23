"""The interface of llama.cpp's server, as its editor plugins use it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from ...events import Result
from ..answering import result_of
from ..fields import SamplingFields, caller_of, stops_of, timings
from ..middles import Middle, fill_middle, filled_text
from ..service import Service


class InfillBody(SamplingFields):
    """A request for what is missing between `input_prefix` with `prompt`, and `input_suffix`.

    input_extra: other pieces of code, which are read first. n_predict: most tokens; 0 only reads, below 0 is the
    server's choice. t_max_predict_ms: a time budget, which becomes one of steps. response_fields: what is answered,
    with a path for a name.
    """

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[dict[str, Any]] | None = None
    prompt: str = ""
    n_predict: int | None = None
    stop: list[str] | None = None
    id_slot: int | None = None
    t_max_predict_ms: float | None = None
    response_fields: list[str] | None = None
    model: str | None = None


class TokenizeBody(BaseModel):
    """A text to be made into tokens."""

    content: str
    add_special: bool = False


def routes(service: Service) -> APIRouter:
    """Make the routes of this interface."""
    router = APIRouter(tags=["llama.cpp"])

    @router.post("/infill")
    async def infill(request: Request, body: InfillBody) -> Response:
        """Fill in the middle of a file. A new request takes the place of one in the same slot that still waits."""
        service.check_model(body.model)
        extra = "".join(f"{piece.get('filename', '')}\n{piece.get('text', '')}\n\n" for piece in body.input_extra or ())
        tokens = None if body.n_predict is None or body.n_predict < 0 else body.n_predict
        middle = Middle(extra + body.input_prefix + body.prompt, body.input_suffix, tokens)
        job = await fill_middle(
            service,
            middle,
            service.canvas_options(body.sampling()),
            caller_of(request),
            slot=None if body.id_slot is None or tokens == 0 else str(body.id_slot),
            seconds=None if body.t_max_predict_ms is None else body.t_max_predict_ms / 1e3,
        )
        answer = _answer(await result_of(request, service.engine, job), stops_of(body.stop))
        if body.response_fields:
            answer = {path: found for path in body.response_fields if (found := _at(answer, path)) is not None}
        return JSONResponse(answer)

    @router.get("/props")
    async def props() -> dict[str, Any]:
        """Describe the server as llama.cpp describes itself."""
        return {
            "default_generation_settings": {"n_ctx": service.most_tokens},
            "total_slots": 1,
            "model_alias": service.name,
            "model_path": service.name,
        }

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, list[int]]:
        """Make tokens of a text."""
        tokenizer = service.engine.loaded.processor.tokenizer
        make = tokenizer.encode
        return {"tokens": await service.engine.prepare(lambda: make(body.content, add_special_tokens=body.add_special))}

    return router


def _answer(result: Result, stops: tuple[str, ...]) -> dict[str, Any]:
    return {
        "content": filled_text(result, stops),
        "stop": True,
        "stop_type": "limit" if result.finish_reason == "length" else "eos",
        "truncated": False,
        "tokens_predicted": result.stats.generated_tokens,
        "tokens_evaluated": result.stats.prompt_tokens,
        "tokens_cached": result.stats.cached_tokens,
        "timings": timings(result.stats),
    }


def _at(answer: dict[str, Any], path: str) -> Any:
    """What is at a path such as `timings/prompt_n`; None where there is nothing."""
    found: Any = answer
    for name in path.split("/"):
        found = found.get(name) if isinstance(found, dict) else None
    return found
