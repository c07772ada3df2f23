"""A response as it is written, and the events that tell of each addition to it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...events import Done, ToolCall
from ..fields import Piece
from ..refusals import Refusal

if TYPE_CHECKING:
    from ...processing.processor import Processor

Event = dict[str, Any]


class ResponseWriter:
    """Writes a response: `response` as it is so far. An item begins where the kind of text changes; a tool call is one.

    echoed: what the response repeats of its request.
    """

    def __init__(self, echoed: dict[str, Any], processor: Processor) -> None:
        self.processor = processor
        self.output: list[dict[str, Any]] = []
        self.response: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": self.output,
            "usage": None,
            "store": False,
            **echoed,
        }
        self._number = 0
        self._open = False  # whether the last item still grows

    def start(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response={**self.response, "output": []})

    def add(self, piece: Piece) -> Iterator[Event]:
        """Add a piece of the reply."""
        if isinstance(piece, ToolCall):
            yield from self._call(piece)
            return
        kind, text = piece
        if not self._open or self.output[-1]["type"] != _ITEMS[kind]:
            yield from self._begin(kind)
        self.output[-1]["content"][0]["text"] += text
        more = _more(kind)
        yield self._event(f"response.{_PARTS[kind]}.delta", **self._place, content_index=0, delta=text, **more)

    def end(self, done: Done) -> Iterator[Event]:
        """End the reply."""
        yield from self._finish()
        complete = done.finish_reason != "length"
        stats = done.stats
        thoughts = "".join(item["content"][0]["text"] for item in self.output if item["type"] == "reasoning")
        thought_tokens = len(self.processor.tokenizer.encode(thoughts, add_special_tokens=False)) if thoughts else 0
        self.response |= {
            "status": "completed" if complete else "incomplete",
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "completed_at": int(time.time()) if complete else None,
            "usage": {
                "input_tokens": stats.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": stats.cached_tokens,
                    "cache_write_tokens": stats.prompt_tokens - stats.cached_tokens,
                },
                "output_tokens": stats.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": thought_tokens},
                "total_tokens": stats.prompt_tokens + stats.generated_tokens,
            },
        }
        yield self._event(f"response.{self.response['status']}", response=self.response)

    def fail(self, refusal: Refusal) -> Event:
        """End the response with what went wrong."""
        code = "server_error" if refusal.status >= 500 else "invalid_prompt"
        self.response |= {"status": "failed", "error": {"code": code, "message": str(refusal)}}
        return self._event("response.failed", response=self.response)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _event(self, kind: str, **more: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return event

    def _item_event(self, kind: str) -> Event:
        return self._event(
            f"response.output_item.{kind}", output_index=len(self.output) - 1, item=_copy(self.output[-1])
        )

    def _begin(self, kind: str) -> Iterator[Event]:
        yield from self._finish()
        item: dict[str, Any] = {"id": f"item_{secrets.token_hex(8)}", "type": _ITEMS[kind], "status": "in_progress"}
        own: dict[str, Any] = {"role": "assistant"} if kind == "text" else {"summary": []}
        self.output.append({**item, **own, "content": []})
        yield self._item_event("added")
        self.output[-1]["content"].append(_part(kind))
        self._open = True
        yield self._event("response.content_part.added", **self._place, content_index=0, part=_part(kind))

    def _finish(self) -> Iterator[Event]:
        """End the item that still grows, if there is one."""
        if not self._open:
            return
        self._open = False
        item = self.output[-1]
        kind = "text" if item["type"] == "message" else "thinking"
        part = dict(item["content"][0])
        text, more = part["text"], _more(kind)
        yield self._event(f"response.{_PARTS[kind]}.done", **self._place, content_index=0, text=text, **more)
        yield self._event("response.content_part.done", **self._place, content_index=0, part=part)
        item["status"] = "completed"
        yield self._item_event("done")

    def _call(self, call: ToolCall) -> Iterator[Event]:
        yield from self._finish()
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        item = {"id": f"item_{secrets.token_hex(8)}", "type": "function_call", "call_id": call.id, "name": call.name}
        self.output.append({**item, "arguments": "", "status": "in_progress"})
        yield self._item_event("added")
        yield self._event("response.function_call_arguments.delta", **self._place, delta=arguments)
        self.output[-1] |= {"arguments": arguments, "status": "completed"}
        yield self._event("response.function_call_arguments.done", **self._place, arguments=arguments, name=call.name)
        yield self._item_event("done")


_ITEMS = {"text": "message", "thinking": "reasoning"}
_PARTS = {"text": "output_text", "thinking": "reasoning_text"}


def _part(kind: str) -> dict[str, Any]:
    annotations: dict[str, Any] = {"annotations": []} if kind == "text" else {}
    return {"type": _PARTS[kind], "text": "", **annotations, **_more(kind)}


def _more(kind: str) -> dict[str, Any]:
    """What text has beside itself, and thoughts have not: log probabilities, of which there are none."""
    return {"logprobs": []} if kind == "text" else {}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Copy an item that goes on growing."""
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
