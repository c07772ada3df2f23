"""Requests that are not answered, and how each interface says why."""

from __future__ import annotations

from typing import Any

from ..errors import DiffusionGemmaError

MESSAGES = "/v1/messages"  # Anthropic's, which has an envelope of its own
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = _OPENAI_TYPES | {413: "request_too_large", 503: "overloaded_error"}


class Refusal(DiffusionGemmaError):
    """A request that is answered with an error.

    status: of HTTP. code: what programs can tell the error by. param: the field of the request that it is about.
    retry_after: seconds after which the same request may work. more: further fields of the error.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        self.more = more or {}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self, path: str) -> dict[str, Any]:
        """Write the error as the clients of the interface at `path` expect it."""
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        if path.startswith(MESSAGES):
            kind = _ANTHROPIC_TYPES.get(self.status, fallback if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": str(self), **self.more}}
        kind = _OPENAI_TYPES.get(self.status, fallback)
        code = self.code or self.status
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": code, **self.more}}


def as_refusal(error: Exception) -> Refusal:
    """Make a refusal of what went wrong; only sentences that are meant for users go out."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, DiffusionGemmaError):
        return Refusal(str(error))
    if isinstance(error, RecursionError):
        return Refusal("The body is nested too deeply; send a flatter one.")
    return Refusal("Something went wrong in the server; its log says what.", 500)
