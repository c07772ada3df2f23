"""JSON Schemas for replies: which keywords are honoured, and the form in which a grammar is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import PromptError
from .strings import portable

# What separates items: as Python's `json.dumps` writes them, so that nothing but the values is left to choose.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

ONE = ("additionalProperties", "items")  # keywords that hold a schema
SOME = ("anyOf", "oneOf", "allOf", "prefixItems")  # a list of schemas
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
HONOURED = {
    *(*ONE, *SOME, *NAMED),
    *("type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
# They say something about a value and ask nothing of it.
ANNOTATIONS = {
    *("$schema", "$id", "$anchor", "$comment", "title", "description", "default", "examples", "example"),
    *("deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding"),
}
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
COUNTS = ("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")


def prepared_schema(schema: Any) -> dict[str, Any]:
    """Check a JSON Schema's keywords, and write it as llguidance takes it: a copy without annotations.

    An object whose schema says nothing of other properties than those that it lists gets none: it is valid all the
    same, and its end is where the list ends. Raises PromptError, which names a keyword that cannot be honoured.
    """
    if not isinstance(schema, Mapping):
        raise PromptError(f"A schema is a JSON object such as {{'type': 'object'}}, not a {type(schema).__name__}.")
    try:
        copy = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"The schema cannot be written as JSON ({error}); give plain lists and mappings.") from None
    nodes = list(_nodes(copy, "schema"))
    for path, node in nodes:
        _check(node, path)
    for _, node in nodes:
        if "pattern" in node:
            node["pattern"] = portable(node["pattern"])
        for name in (ANNOTATIONS & node.keys()) - {"$schema", "$id", "$anchor"}:
            del node[name]
    # Closing one of several objects that a value has to be at once would leave nothing that is all of them.
    if not any("allOf" in node or ("$ref" in node and node.keys() & HONOURED - {"$ref", "$defs"}) for _, node in nodes):
        for _, node in nodes:
            _close(node)
    return {**copy, "x-guidance": LAYOUT}


def _nodes(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give every schema in a schema, with the way to it. Raises PromptError where one is none."""
    if isinstance(node, bool):
        return
    if not isinstance(node, dict):
        raise PromptError(f"`{path}` must be a JSON schema, not {node!r}.")
    yield path, node
    for name in SOME:
        if isinstance(node.get(name), list):
            for number, item in enumerate(node[name]):
                yield from _nodes(item, f"{path}.{name}[{number}]")
    for name in ONE:
        if name in node:
            yield from _nodes(node[name], f"{path}.{name}")
    for name in NAMED:
        for key, item in _mapping(node, name, path).items():
            yield from _nodes(item, f"{path}.{name}.{key}")


def _mapping(node: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    value = node.get(name, {})
    if not isinstance(value, dict):
        raise PromptError(f"`{path}.{name}` must map names to schemas, not {value!r}.")
    return value


def _check(node: dict[str, Any], path: str) -> None:
    """Raises PromptError for a keyword that is not honoured, or whose value would be passed over."""
    for name, value in node.items():
        if name not in HONOURED and name not in ANNOTATIONS:
            raise PromptError(f"The keyword `{name}` of `{path}` cannot be honoured; leave it out of the schema.")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "pattern" and not isinstance(value, str):
            raise PromptError(f"`{path}.pattern` must be a regular expression, not {value!r}.")
        if name in NUMBERS and not is_number:
            raise PromptError(f"`{path}.{name}` must be a number, not {value!r}.")
        if name in COUNTS and not (is_number and value >= 0 and value == int(value)):
            raise PromptError(f"`{path}.{name}` must be a whole number of at least 0, not {value!r}.")
    if node.get("type") != "integer":
        _check_exclusive(node, path)


def _check_exclusive(node: dict[str, Any], path: str) -> None:
    """Raises PromptError for a whole number that is left out although all others within 1 of it may be: llguidance 1.9
    lets it in.
    """
    for exclusive, others in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
    ):
        limit = node.get(exclusive, 0.5)
        if limit == int(limit) and any(abs(node[name] - limit) < 1 for name in others if name in node):
            raise PromptError(
                f"The keyword `{exclusive}` of `{path}` cannot be honoured with another limit less than 1 away; "
                f"give a {exclusive.removeprefix('exclusive').lower()} instead."
            )


def _close(node: dict[str, Any]) -> None:
    """Leave no room for properties that are not listed, where the schema does not speak of them."""
    others = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "minProperties", "maxProperties")
    listed = node.get("properties", {}).keys()
    if listed and set(node.get("required", ())) <= listed and not any(name in node for name in others):
        node["additionalProperties"] = False
