"""Fields that requests of several interfaces have in common, and what replies are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field
from starlette.requests import Request

from ..errors import PromptError
from ..events import Commit, Done, Draft, Result, Stats, ToolCall
from ..processing.tools import parse_tool_calls
from .service import one_of

Piece = tuple[Literal["text", "thinking"], str] | ToolCall


class SamplingFields(BaseModel):
    """The sampling of a reply: `GenerationOptions` by their own names, of which other servers' clients send some."""

    seed: int | None = Field(None, validation_alias=AliasChoices("seed", "random_seed"))  # the latter is Mistral's
    decoder: str | None = None
    max_steps: int | None = None
    entropy_bound: float | None = None
    confidence: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampling(self) -> dict[str, Any]:
        """These fields by name. A negative seed is llama.cpp's way to ask for another one each time."""
        fields = {name: value for name, value in self if name in SamplingFields.model_fields}
        if self.seed is not None and self.seed < 0:
            fields["seed"] = None
        return fields


def stops_of(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a client writes them; empty ones, which some send, stop nothing."""
    return tuple(text for text in ([stop] if isinstance(stop, str) else stop or ()) if text)


def chosen_tool(choice: Any) -> str | None:
    """The tool that must be called, "required" for any of them, None where that is left to the model. Raises
    PromptError.
    """
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        choice = ("function", function.get("name") if isinstance(function, dict) else None)
    match choice:
        case None | "auto" | "none":
            return None
        case "required":
            return "required"
        case ("function", str(name)):
            return name
    raise PromptError(
        f"`tool_choice` is {choice!r}, which this server cannot do; it knows auto, none, required, a tool."
    )


def schema_of(form: Any, field: str) -> Any:
    """The JSON Schema that a `response_format`, or what other interfaces call so, asks for; None where it is text.
    Raises PromptError.
    """
    kind = form.get("type", "text") if form else "text"
    one_of(f"{field}.type", kind, ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    own = form.get("json_schema", form)
    schema = own.get("schema") if isinstance(own, dict) else None
    if not isinstance(schema, dict):
        raise PromptError(f"`{field}` has no schema; send it as JSON Schema.")
    return schema


def is_thinking(effort: str | None) -> bool:
    """Whether a reasoning effort asks for thinking at all."""
    return effort is not None and effort not in ("none", "minimal")


def pieces_of(commit: Commit) -> Iterator[Piece]:
    """Give what a commit adds to a reply, in order. A call that cannot be read is text, as it was written."""
    calls = iter(commit.tool_calls)
    for kind, text in commit.parts:
        if kind != "tool_call":
            yield kind, text
            continue
        readable = parse_tool_calls(text)
        yield from (next(calls) for _ in readable)
        if not readable:
            yield "text", text


def caller_of(request: Request) -> str:
    """Who asks, for taking turns: the program and its machine."""
    address = request.client.host if request.client else ""
    return f"{address} {request.headers.get('user-agent', '')}"


def timings(stats: Stats) -> dict[str, Any]:
    """Tell how fast it went, in llama.cpp's words: clients cannot tell from canvases that arrive as a whole."""
    read = stats.prompt_tokens - stats.cached_tokens
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": read,
        "prompt_ms": round(stats.prompt_seconds * 1e3, 3),
        "prompt_per_second": round(stats.prompt_tokens_per_second, 3),
        "predicted_n": stats.generated_tokens,
        "predicted_ms": round(stats.denoise_seconds * 1e3, 3),
        "predicted_per_second": round(stats.tokens_per_second, 3),
        "denoising_steps": sum(stats.steps),
    }


def usage(stats: Stats, predicted: tuple[int, int] | None = None) -> dict[str, Any]:
    """OpenAI's account of tokens. predicted: how many of a prediction's were accepted and rejected."""
    counted: dict[str, Any] = {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }
    if predicted:
        names = ("accepted_prediction_tokens", "rejected_prediction_tokens")
        counted["completion_tokens_details"] = dict(zip(names, predicted, strict=True))
    return counted


def finish_of(done: Done | Result, calls: Sequence[ToolCall]) -> Literal["stop", "length", "tool_calls"]:
    """OpenAI's word for why a reply ended."""
    if calls and done.finish_reason == "tool":
        return "tool_calls"
    return "length" if done.finish_reason == "length" else "stop"


def diffusion_frame(draft: Draft) -> dict[str, Any]:
    """Write a denoising step: what a chunk has beside its choices."""
    return {
        "type": "diffusion_frame",
        "block": draft.canvas,
        "step": draft.step,
        "total": draft.max_steps,
        "text": draft.text,
        "pieces": draft.pieces,
        "accepted": draft.accepted,
        "entropy": [round(value, 4) for value in draft.entropy],
    }
