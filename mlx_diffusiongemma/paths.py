"""Paths as users write them, and where a user's files are kept."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from .errors import PromptError

NAME = "mlx-diffusiongemma"


def user_path(path: str | Path) -> Path:
    """Resolve a leading ~ in `path`. Raises PromptError where that user is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise PromptError(f"{path} begins with a user who is not known here; check the path.") from None


def data_directory() -> Path:
    """Where what the user would miss is kept: $XDG_DATA_HOME, else the system's place for it. It may not exist yet."""
    return _home_of("XDG_DATA_HOME", "Library/Application Support", ".local/share")


def cache_directory() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME, else the system's place for it. It may not exist yet."""
    return _home_of("XDG_CACHE_HOME", "Library/Caches", ".cache")


def _home_of(variable: str, on_a_mac: str, elsewhere: str) -> Path:
    given = os.environ.get(variable, "")
    if os.path.isabs(given):  # the specification has relative ones ignored
        return Path(given) / NAME
    return user_path("~") / (on_a_mac if platform.system() == "Darwin" else elsewhere) / NAME
