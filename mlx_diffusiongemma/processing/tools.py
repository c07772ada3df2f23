"""Tools: schemas that declare them to the model, and the calls it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import PromptError
from ..events import ToolCall

QUOTE = '<|"|>'
DEEPEST = 64
_NUMBERED = re.compile(r"call_([0-9]{1,9})")  # longer numbers are not ours, and `int` refuses the longest

Tool = Mapping[str, Any] | Callable[..., Any]


def tool_schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Write `tools` as OpenAI-style schemas, `{"type": "function", "function": {…}}`.

    A tool is such a schema, the bare `{"name": …, "parameters": …}` of one, or a Python function with type hints and a
    Google-style docstring that describes it and its arguments. Raises PromptError.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise PromptError(f"`tools` takes a list, not a {type(tools).__name__}.")
    schemas = [_schema(tool, f"Tool {number}") for number, tool in enumerate(tools, 1)]
    names = [schema["function"]["name"] for schema in schemas]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise PromptError(f"Several tools are called {repeated[0]!r}; give each a name of its own.")
    return schemas


def _schema(tool: Tool, where: str) -> dict[str, Any]:
    if callable(tool):
        return _schema_of_function(tool)
    if not isinstance(tool, Mapping):
        raise PromptError(f"{where} is a {type(tool).__name__}; give a schema or a Python function.")
    function = tool.get("function", tool if "name" in tool else None)
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise PromptError(f'{where} is not {{"type": "function", "function": {{"name": …, "parameters": …}}}}.')
    name = function.get("name")
    if not isinstance(name, str) or not name or set(name) & set("{}<>, \n"):
        raise PromptError(f"{where} has the name {name!r}; a function name is a word without spaces and brackets.")
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise PromptError(f"The description of the tool {name!r} must be text.")
    parameters = function.get("parameters") or {}
    _check_schema(parameters, f"The tool {name!r}", "parameters")
    return {
        "type": "function",
        "function": {**function, "description": description, "parameters": parameters},
    }


def _schema_of_function(function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        return get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, NameError, ValueError, TypeError) as error:
        name = getattr(function, "__name__", repr(function))
        reason = " ".join(str(error).split()).rstrip(".")
        raise PromptError(
            f"The function {name!r} cannot be described to the model ({reason}); give it type hints and a docstring "
            "with an Args section, or a schema."
        ) from None


def _check_schema(schema: Any, where: str, path: str, depth: int = 0) -> None:
    """Check what every chat template relies on: objects where it looks for fields. Raises PromptError."""
    if not isinstance(schema, Mapping):
        raise PromptError(f"{where}: `{path}` must be a JSON schema, not {_brief(schema)}.")
    if depth > DEEPEST:
        raise PromptError(f"{where}: its parameters are nested more than {DEEPEST} levels deep.")
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if kind is not None and not all(isinstance(name, str) for name in kinds):
        raise PromptError(f"{where}: `{path}.type` must be the name of a type, not {_brief(kind)}.")
    required = schema.get("required") or []
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise PromptError(f"{where}: `{path}.required` must list names, not {_brief(required)}.")
    properties = schema.get("properties") or {}
    if not isinstance(properties, Mapping) or not all(isinstance(name, str) for name in properties):
        raise PromptError(f"{where}: `{path}.properties` must map names to schemas, not {_brief(properties)}.")
    for name, value in properties.items():
        _check_schema(value, where, f"{path}.properties.{name}", depth + 1)
    if isinstance(schema.get("items"), Mapping):
        _check_schema(schema["items"], where, f"{path}.items", depth + 1)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def call_id(number: int) -> str:
    """Make the id of a conversation's tool call; ids are counted, so that the same seed gives the same ones."""
    return f"call_{number}"


def number_calls(calls: Iterable[ToolCall], first: int) -> list[ToolCall]:
    """Give each call its id, counted from `first` on."""
    return [replace(call, id=call_id(number)) for number, call in enumerate(calls, first)]


def free_number(ids: Iterable[str]) -> int:
    """Find the first number from which on no `call_id` is among `ids`."""
    return 1 + max((int(match[1]) for match in map(_NUMBERED.fullmatch, ids) if match), default=0)


def parse_tool_calls(body: str) -> list[ToolCall]:
    """Read the calls in the text between `<|tool_call>` and `<tool_call|>`; none if any of it cannot be read.

    mlx-lm's parser turns the text into JSON with regular expressions, and so fails on keys such as `max-tokens`, on
    spaces after commas and on names such as `files.read`, and takes a NUL for one of its own place holders.
    """
    reader = _CallReader(body)
    calls = []
    try:
        while not reader.at_end():
            calls.append(reader.call())
    except (ValueError, RecursionError):
        return []
    return calls


class _CallReader:
    """Reads `call:NAME{key:value,…}`: JSON, but keys need no quotation marks and strings have Gemma's own.

    Every method reads from `self._at` on and raises ValueError where the text is not what it looks for.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._json = json.JSONDecoder(parse_constant=_refuse_constant)

    def at_end(self) -> bool:
        self._skip_space()
        return self._at == len(self._text)

    def call(self) -> ToolCall:
        if not self._skip("call:"):
            raise ValueError("no call")
        start = self._at
        self._at = self._text.index("{", start)
        name = self._text[start : self._at].strip()
        if not name or len(name.split()) > 1:
            raise ValueError("no name")
        return ToolCall(name, self._object(depth=0))

    def _object(self, depth: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for _ in self._items("{", "}"):
            key = self._key()
            if not self._skip(":"):
                raise ValueError("a key without a value")
            fields[key] = self._value(depth + 1)
        return fields

    def _array(self, depth: int) -> list[Any]:
        return [self._value(depth + 1) for _ in self._items("[", "]")]

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Yield once before each item of a bracketed list, with the reader where the item begins."""
        if not self._skip(opening):
            raise ValueError(f"no {opening}")
        if self._skip(closing):
            return
        while True:
            yield
            if self._skip(closing):
                return
            if not self._skip(","):
                raise ValueError(f"neither , nor {closing}")

    def _value(self, depth: int) -> Any:
        if depth > DEEPEST:
            raise ValueError("nested too deep")
        self._skip_space()
        if self._text.startswith("{", self._at):
            return self._object(depth)
        if self._text.startswith("[", self._at):
            return self._array(depth)
        if self._skip(QUOTE):
            return self._quoted()
        value, self._at = self._json.raw_decode(self._text, self._at)
        return value

    def _key(self) -> str:
        if self._skip(QUOTE):
            return self._quoted()
        if self._text.startswith('"', self._at):
            key: str
            key, self._at = self._json.raw_decode(self._text, self._at)
            return key
        end = self._text.index(":", self._at)
        key = self._text[self._at : end].strip()
        if not key or set(key) & set('{}[],"') or QUOTE in key:
            raise ValueError("no key")
        self._at = end
        return key

    def _quoted(self) -> str:
        """Read a string after its opening mark: everything up to the next one, as it stands."""
        end = self._text.index(QUOTE, self._at)
        string = self._text[self._at : end]
        self._at = end + len(QUOTE)
        return string

    def _skip(self, symbol: str) -> bool:
        """Go past white space, then past `symbol` if it comes next."""
        self._skip_space()
        if not self._text.startswith(symbol, self._at):
            return False
        self._at += len(symbol)
        return True

    def _skip_space(self) -> None:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
