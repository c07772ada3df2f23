"""The server about itself: the models it has, its health and its figures."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .refusals import Refusal
from .service import Service


def routes(service: Service) -> APIRouter:
    """Make the routes that clients ask before they send work."""
    router = APIRouter(tags=["Status"])
    since = int(time.time())

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the model that is loaded, with its limits as several clients name them."""
        return {"object": "list", "data": [_model(service, since)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe the model that is loaded."""
        service.check_model(name)
        return _model(service, since)

    @router.get("/health")
    async def health() -> Response:
        """Say whether requests are answered now."""
        try:
            service.engine.check_open()
        except Refusal as refusal:
            error = {"code": refusal.status, "message": str(refusal), "type": "unavailable_error"}
            return JSONResponse({"error": error}, refusal.status, refusal.headers)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Tell the figures in Prometheus' text format."""
        text = service.engine.metrics.text(service.engine.gauges)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return router


def _model(service: Service, since: int) -> dict[str, Any]:
    most = service.most_tokens
    return {
        "id": service.name,
        "object": "model",
        "created": since,
        "owned_by": "mlx-diffusiongemma",
        "max_model_len": most,
        "context_length": most,
        "n_ctx": most,
        "max_output_length": min(service.options.max_tokens, most),
    }
