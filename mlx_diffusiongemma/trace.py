"""Events as JSON lines."""

from __future__ import annotations

import json
from typing import Any

from .events import Commit, Done, Draft, Event, Prefill


def event_json(event: Event) -> str:
    """An event as one line of JSON, with its kind in `type`: prefill, draft, commit or done."""
    return json.dumps(_fields(event), ensure_ascii=False)


def _fields(event: Event) -> dict[str, Any]:
    kind = {"type": type(event).__name__.lower()}
    match event:
        case Prefill():
            return kind | vars(event)
        case Draft():
            return kind | vars(event) | {"entropy": [round(value, 5) for value in event.entropy]}
        case Commit():
            return kind | vars(event) | {"text": event.text}
        case Done(finish_reason, stats):
            rates = {
                name: round(rate, 3)
                for name, rate in (
                    ("prompt_tokens_per_second", stats.prompt_tokens_per_second),
                    ("tokens_per_second", stats.tokens_per_second),
                    ("steps_per_canvas", stats.steps_per_canvas),
                    ("tokens_per_step", stats.tokens_per_step),
                )
            }
            return kind | {"finish_reason": finish_reason, "stats": vars(stats) | rates}
