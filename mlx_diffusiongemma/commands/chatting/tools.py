"""Typed functions from a file, which the model may call and the user allows."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import PromptError
from ...events import ToolCall
from ...processing.tools import tool_schemas

Functions = dict[str, Callable[..., Any]]


class Failure(Exception):
    """The error that a tool raised, in words for the model and the user."""


def load_functions(path: Path) -> Functions:
    """Run the Python file at `path` and collect the public functions that it defines, by name. Raises PromptError."""
    spec = importlib.util.spec_from_file_location("mlx_dg_chat_tools", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise PromptError(f"{path} is not a Python file; give one that defines typed functions.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise PromptError(f"{path} cannot be run ({type(error).__name__}: {error}); mend it first.") from None
    found: Functions = {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
    }
    if not found:
        raise PromptError(f"{path} defines no public function; write one with type hints and a docstring.")
    tool_schemas(list(found.values()))  # or the first message would say what cannot be described
    return found


def written(call: ToolCall) -> str:
    """Write a call as Python would."""
    return written_call(call.name, call.arguments)


def written_call(name: str, arguments: dict[str, Any]) -> str:
    """Write a call of `name` as Python would."""
    given = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    return f"{name}({', '.join(given)})"


def run_call(functions: Functions, call: ToolCall) -> Any:
    """Call the function and return what it gives. Raises Failure for whatever it raises; Ctrl-C comes through."""
    try:
        return functions[call.name](**call.arguments)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise Failure(f"{type(error).__name__}: {error}") from error
