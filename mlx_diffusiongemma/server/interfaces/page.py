"""The page at `/`: a chat whose canvas can be watched. Plain files, without a build step."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

from ..service import Service

FOLDER = Path(__file__).parents[1] / "page"
# Nothing comes from elsewhere, and no text can become a script.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes(service: Service) -> APIRouter:
    """Make the routes of the page's files."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index() -> FileResponse:
        return _file("index.html")

    @router.get("/page.css")
    async def style() -> FileResponse:
        return _file("page.css")

    @router.get("/page.js")
    async def script() -> FileResponse:
        return _file("page.js")

    return router


def _file(name: str) -> FileResponse:
    return FileResponse(FOLDER / name, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})
