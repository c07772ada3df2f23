"""The page at `/`: a chat whose canvas can be watched, in plain files without a build step; and the list at `/docs`."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse

from ..service import Service

FOLDER = Path(__file__).parents[1] / "page"
FILES = frozenset(path.name for path in FOLDER.iterdir())
# Nothing comes from elsewhere, and no text can become a script.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>DiffusionGemma: addresses</title><link rel="stylesheet" href="page/page.css"></head>
<body><header><h1>Addresses</h1><a href="openapi.json">openapi.json</a></header>
<main><dl>{rows}</dl></main></body></html>
"""


def routes(service: Service) -> APIRouter:
    """Make the routes of the page's files."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index() -> FileResponse:
        return _file("index.html")

    @router.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        """List what the server understands. FastAPI's own page of this needs scripts from elsewhere."""
        rows = "".join(_rows(request.app.openapi()["paths"]))
        return HTMLResponse(DOCS.format(rows=rows), headers={"Content-Security-Policy": POLICY})

    @router.get("/page/{name}")
    async def asset(name: str) -> FileResponse:
        if name not in FILES:
            raise HTTPException(404)
        return _file(name)

    return router


def _rows(paths: dict[str, Any]) -> Iterator[str]:
    """Describe each address: its interface, method, path, and what it does."""
    for path, methods in paths.items():
        for method, operation in methods.items():
            head = f"{operation['tags'][0]}: {method.upper()} {path}"
            yield f"<dt><code>{escape(head)}</code></dt><dd>{escape(operation['description'])}</dd>"


def _file(name: str) -> FileResponse:
    return FileResponse(FOLDER / name, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})
