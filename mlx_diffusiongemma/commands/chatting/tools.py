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
    arguments = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"


def run_call(functions: Functions, call: ToolCall) -> Any:
    """Call the function and return what it gives; what it raises becomes the answer that the model gets."""
    try:
        return functions[call.name](**call.arguments)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        return {"error": f"{type(error).__name__}: {error}"}
