"""The checks that every request passes before an interface sees it: who asks, from where, and how much."""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import socket
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from .refusals import Refusal
from .work.engine import LOG

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .work.metrics import Metrics

MOST_BODY_BYTES = 32 * 2**20
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Says nothing that a stranger may not know; the page asks for the key itself.
OPEN = re.compile(r"/|/health|/page/[^/]+")
# Some clients take the address without /v1 for the interface's root.
UNDER_V1 = (
    *("/models", "/chat/completions", "/completions", "/responses", "/messages", "/messages/count_tokens"),
    *("/fim/completions", "/edit/completions", "/edits", "/decisions"),
)


@dataclass(frozen=True)
class Rules:
    """Who may ask. host: the address that is listened on. key: what every request must carry; None where all of them
    come from this machine. origins: of web pages on other sites that may ask.
    """

    host: str = "127.0.0.1"
    key: str | None = None
    origins: Collection[str] = ()

    def check(self, headers: Headers, path: str) -> None:
        """Raises Refusal. Names that only look like this machine's are how web pages reach local servers."""
        host = headers.get("host", "")
        if not self._knows_host(host):
            raise Refusal(
                f"The host {host[:80]!r} is not one of this server's names; use its address.", 403, code="host"
            )
        origin = headers.get("origin")
        if origin is not None and not self.allows(origin) and urlsplit(origin).netloc != host:
            raise Refusal(
                f"Pages of {origin[:80]!r} may not ask this server; start it with --allow-origin to let them.",
                403,
                code="origin",
            )
        if self.key is not None and not OPEN.fullmatch(path) and not self._has_key(headers):
            raise Refusal(
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.", 401, code="invalid_api_key"
            )

    def allows(self, origin: str | None) -> bool:
        """Whether pages of another site may read the answers."""
        return origin is not None and origin in self.origins

    def _knows_host(self, host: str) -> bool:
        name = _name_of(host)
        if self.host in LOOPBACK:
            return name in LOOPBACK
        # A name can be pointed at this machine by anyone; an address cannot.
        own = socket.gethostname().lower().removesuffix(".local")
        return name in (*LOOPBACK, self.host.lower(), own, f"{own}.local") or _is_address(name)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), (self.key or "").encode())


class Guard:
    """The outermost layer: checks a request against the rules, reads its body within the limit, and logs a line.

    It is plain ASGI, so that what it guards hears of a disconnect.
    """

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # where the caller is gone before an answer
        path = scope["path"].rstrip("/") or "/"
        path = f"/v1{path}" if path in UNDER_V1 else path
        scope = {**scope, "path": path, "raw_path": path.encode(), "notes": {}}
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(MutableHeaders(scope=message), origin if self.rules.allows(origin) else None)
            await send(message)

        try:
            self.rules.check(headers, "/" if scope["method"] == "OPTIONS" else path)
            if scope["method"] == "OPTIONS":
                await _preflight(headers)(scope, receive, answer)
                return
            body = await _body(headers, receive) if scope["method"] == "POST" else b""
            await self.app(scope, _replay(body, receive), answer)
        except Refusal as refusal:
            await JSONResponse(refusal.body(path), refusal.status, refusal.headers)(scope, receive, answer)
        except Exception:
            LOG.exception("a request failed")
        finally:
            route = scope.get("route")  # as it is declared: paths themselves are as many as callers make up
            self.metrics.answered(route.path if route else "other", status)
            notes = "".join(f" {name}={value}" for name, value in scope["notes"].items())
            seconds = time.perf_counter() - started
            LOG.info("%s %s %d %.3fs%s", scope["method"], json.dumps(path)[1:-1], status, seconds, notes)


def _add_headers(headers: MutableHeaders, origin: str | None) -> None:
    headers["X-Content-Type-Options"] = "nosniff"
    if origin:
        headers["Access-Control-Allow-Origin"] = origin
        headers.add_vary_header("Origin")


def _preflight(headers: Headers) -> Response:
    """Answer a browser that asks whether an allowed page may send a request."""
    wanted = headers.get("access-control-request-headers", "")
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": wanted if wanted.isprintable() else "",
            "Access-Control-Max-Age": "600",
        },
    )


async def _body(headers: Headers, receive: Receive) -> bytes:
    """Read a JSON body. Raises Refusal where it is another kind, or larger than the limit."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of any site can send unasked is of another type
        raise Refusal(f"The body is of type {kind[:40]!r}; send application/json.", 415, code="content_type")
    length = headers.get("content-length", "")
    body, more = bytearray(), True
    while more and len(body) <= MOST_BODY_BYTES and not (length.isdigit() and int(length) > MOST_BODY_BYTES):
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if more:
        raise Refusal(f"The body is larger than {MOST_BODY_BYTES // 2**20} MB; send less.", 413, code="too_large")
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read, and then what else comes: the disconnect."""
    messages: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> Message:
        first = next(messages, None)
        return await receive() if first is None else first

    return again


def _name_of(host: str) -> str:
    """The name or address in a Host header, without its port; "" where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
