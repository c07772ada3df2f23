"""Hooks that PyInstaller needs in order to freeze a program that imports this package; it finds them by itself."""

from __future__ import annotations

from pathlib import Path


def hook_directories() -> list[str]:
    """Where the hooks are: PyInstaller asks through the entry point in pyproject.toml."""
    return [str(Path(__file__).parent)]
