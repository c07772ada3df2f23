"""The web application: every interface, over one engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from .. import __version__
from ..errors import DiffusionGemmaError
from . import status
from .answering import refused
from .guard import Guard, Rules
from .interfaces import anthropic, completions, decisions, editors, edits, openai_chat, openai_responses, page
from .refusals import Refusal
from .service import Service


def make_app(service: Service, rules: Rules) -> ASGIApp:
    """Make the application, which starts the engine when it starts, and closes it when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        service.engine.start()
        yield
        service.engine.close()
        service.engine.join()

    app = FastAPI(
        title="mlx-diffusiongemma",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    for interface in (status, openai_chat, completions, openai_responses, anthropic, editors, edits, decisions, page):
        app.include_router(interface.routes(service))

    @app.exception_handler(DiffusionGemmaError)
    async def say_what_is_wrong(request: Request, error: DiffusionGemmaError) -> JSONResponse:
        return refused(request, error)

    @app.exception_handler(RequestValidationError)
    async def say_which_field(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(place) for place in first["loc"] if place != "body")
        what = f"`{field}`: {first['msg']}" if field else f"The body is not what is expected here ({first['msg']})"
        return refused(request, Refusal(f"{what.rstrip('.')}.", param=field or None))

    @app.exception_handler(HTTPException)
    async def say_why(request: Request, error: HTTPException) -> JSONResponse:
        sentences = {404: "There is nothing here; /docs lists what is.", 405: "This address has another method."}
        return refused(request, Refusal(sentences.get(error.status_code, f"{error.detail}."), error.status_code))

    @app.exception_handler(Exception)
    async def say_little(request: Request, error: Exception) -> JSONResponse:
        return refused(request, error)  # and it goes on to the guard, which logs it

    return Guard(app, rules, service.engine.metrics)
