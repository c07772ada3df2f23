"""Random JSON Schemas whose values are short: types, enums, patterns, ranges, arrays, nested, optional, $ref, anyOf."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
WORDS = ("name", "age", "city", "kind", "tags", "x-y", "été", "max items", "price", "is_open", "next")
PATTERNS = ("^[a-z]{2,5}$", "^(cat|dog)$", r"^\d{3}-\d{2}$", r"^[A-Z]\w{0,3}$", "^a+b?$", "^.{1,3}$")
FORMATS = ("date", "uuid", "ipv4")


def random_schema(seed: int) -> Schema:
    """An object's schema; the same seed gives the same."""
    draw = random.Random(seed)
    shared = {name: _value(draw, 1, {}) for name in draw.sample(("point", "tag", "size"), draw.randint(0, 2))}
    schema = _object(draw, 3, shared)
    return schema | {"$defs": shared} if shared else schema


def _value(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    """A schema of values nested at most `depth` levels deep. shared: those that it may refer to."""
    kinds: list[Callable[..., Schema]] = [_string, _string, _integer, _number, _enum, _plain]
    if depth:
        kinds += [_array, _object, _any_of]
    if shared:
        return draw.choice([*kinds, _reference])(draw, depth - 1, shared)
    return draw.choice(kinds)(draw, depth - 1, shared)


def _string(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    match draw.randint(0, 2):
        case 0:
            return {"type": "string", "pattern": draw.choice(PATTERNS), "maxLength": 8}
        case 1:
            return {"type": "string", "format": draw.choice(FORMATS)}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 5)}


def _integer(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    least = draw.randint(-200, 200)
    schema: Schema = {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 300)}
    if draw.random() < 0.3:
        schema |= {"multipleOf": draw.choice((2, 5)), "maximum": least + 20}
    return schema


def _number(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    least = draw.randint(-20, 20) / 4
    above = draw.choice(("minimum", "exclusiveMinimum"))
    return {"type": "number", above: least, "maximum": least + draw.randint(4, 40) / 4, "multipleOf": 0.25}


def _enum(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    choices = ["red", "blue", 'q"\\', "ü", 3, -1.5, None, True, [1, "a"], {"k": 2}]
    return (
        {"enum": draw.sample(choices, draw.randint(1, 4))} if draw.random() < 0.7 else {"const": draw.choice(choices)}
    )


def _plain(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    return draw.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}))


def _array(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    least = draw.randint(0, 2)
    schema: Schema = {"type": "array", "minItems": least, "maxItems": least + draw.randint(0, 2)}
    if draw.random() < 0.25:
        schema["prefixItems"] = [_value(draw, 0, shared)]
    return schema | {"items": _value(draw, depth, shared)}


def _object(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    names = draw.sample(WORDS, draw.randint(1, 4))
    schema: Schema = {
        "type": "object",
        "title": "A thing",
        "properties": {name: _value(draw, depth, shared) for name in names},
        "required": [name for name in names if draw.random() < 0.7],
    }
    return schema | {"additionalProperties": False} if draw.random() < 0.5 else schema


def _any_of(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    return {"anyOf": [_value(draw, depth, shared) for _ in range(draw.randint(2, 3))]}


def _reference(draw: random.Random, depth: int, shared: dict[str, Schema]) -> Schema:
    return {"$ref": f"#/$defs/{draw.choice(sorted(shared))}"}
