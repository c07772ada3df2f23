"""Limits to what a request may hold, beside the size of its body: each image and each level of a schema costs more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import PromptError

MOST_IMAGES = 32
DEEPEST = 64  # objects and lists within each other, in a schema


def check_images(messages: Sequence[Any]) -> None:
    """Raises PromptError where chat messages have more images than one request may have."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    count = sum(part.get("type") != "text" for part in parts)
    if count > MOST_IMAGES:
        raise PromptError(f"The messages have {count} images; send at most {MOST_IMAGES} in one request.")


def check_depth(schema: Any, field: str) -> None:
    """Raises PromptError where a schema is nested more deeply than is worth reading."""
    level = [schema]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _within(outer)]
        if not level:
            return
    raise PromptError(f"`{field}` is nested more than {DEEPEST} levels deep; send a flatter one.")


def _within(value: Any) -> Iterable[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (each for each in inner if isinstance(each, dict | list))
