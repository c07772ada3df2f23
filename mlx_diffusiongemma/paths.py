"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from .errors import PromptError


def user_path(path: str | Path) -> Path:
    """Resolve a leading ~ in `path`. Raises PromptError where that user is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise PromptError(f"{path} begins with a user who is not known here; check the path.") from None
