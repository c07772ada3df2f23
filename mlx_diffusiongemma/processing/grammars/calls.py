"""Tool calls as a grammar: `<|tool_call>call:NAME{key:value,…}<tool_call|>`, with arguments as declared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import PromptError
from ..tools import QUOTE
from .schemas import ANNOTATIONS
from .strings import STRING_LIMITS, UNMARKED, string_terminal

# What a schema may say of a value of each type. Numbers are written as in JSON, and so are their limits honoured.
NUMERIC = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
HONOURED = {
    "string": {"enum", "const", *STRING_LIMITS},
    "integer": {"enum", "const", *NUMERIC},
    "number": {"enum", "const", *NUMERIC},
    "boolean": {"enum", "const"},
    "null": set[str](),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
ALWAYS = {*ANNOTATIONS, "type", "nullable", "$defs", "definitions"}
BARE_KEY = r'/[^{}\[\],":<\s][^{}\[\],":<]*/'


def call_grammar(tools: Sequence[Mapping[str, Any]], choice: str, special: Mapping[str, int]) -> str:
    """Write in Lark what a reply is that calls tools: at least one call of any ("required"), or one of the tool named.

    tools: as `tools.tool_schemas` writes them. special: ids of marker tokens. Raises PromptError where there is no
    such tool, or what its arguments have to be like cannot be honoured.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if not functions:
        raise PromptError("`tool_choice` is about `tools`, and there are none.")
    if choice != "required" and choice not in functions:
        raise PromptError(f"tool_choice is {choice!r}; it is 'required' or one of {', '.join(functions)}.")
    missing = [name for name in ("<|tool_call>", "<tool_call|>", QUOTE) if name not in special]
    if missing:
        raise PromptError(f"This checkpoint's tokenizer has no {missing[0]}, so it cannot be made to call tools.")
    rules = _Rules(special[QUOTE])
    chosen = functions if choice == "required" else {choice: functions[choice]}
    bodies = [
        f"{json.dumps(f'call:{name}', ensure_ascii=False)} {rules.arguments(function.get('parameters') or {}, name)}"
        for name, function in chosen.items()
    ]
    call = f"call: <[{special['<|tool_call>']}]> ({' | '.join(bodies)}) <[{special['<tool_call|>']}]>"
    return "\n".join([f"start: call{'+' if choice == 'required' else ''}", call, *rules.lines])


class _Rules:
    """Rules for values, in Gemma's notation; each method gives the name of one. quote: the id of its quotation mark."""

    def __init__(self, quote: int) -> None:
        self.lines: list[str] = []
        self._quote = f"<[{quote}]>"
        self._any: str | None = None
        self._named: dict[str, str] = {}  # rules of what is referred to
        self._root: Mapping[str, Any] = {}
        self._count = 0

    def arguments(self, parameters: Mapping[str, Any], name: str) -> str:
        self._root, self._named = parameters, {}
        others = parameters.get("additionalProperties")
        if parameters.get("properties") or parameters.get("required") or isinstance(others, Mapping):
            return self._object(parameters, f"{name}.parameters")
        return '"{" "}"'

    def _value(self, schema: Any, path: str) -> str:
        if not isinstance(schema, Mapping):
            raise PromptError(f"`{path}` must be a JSON schema, not {schema!r}.")
        if "$ref" in schema:
            self._check(schema, {"$ref"}, path)
            return self._referred(schema["$ref"], path)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                self._check(schema, {name}, path)
                return self._either([self._value(item, f"{path}.{name}") for item in schema[name]])
        kinds = schema.get("type")
        kinds = [*kinds] if isinstance(kinds, list) else [kinds] if kinds else _kinds_of(schema)
        kinds = [str(kind).lower() for kind in kinds]
        honoured = set().union(*(HONOURED.get(kind, set()) for kind in kinds))
        self._check(schema, honoured, path)
        if not kinds:
            return self._anything()
        if schema.keys() & {"enum", "const"}:
            chosen = _kinds_of(schema)
            kinds = [kind for kind in kinds if kind in chosen or (kind == "number" and "integer" in chosen)]
        if schema.get("nullable") and "null" not in kinds:
            kinds.append("null")
        return self._either([self._typed(kind, schema, path) for kind in kinds])

    def _typed(self, kind: str, schema: Mapping[str, Any], path: str) -> str:
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        match kind:
            case "string":
                texts = None if choices is None else _texts(choices, path)
                return self._rule(f"{self._quote} {self._terminal(string_terminal(schema, texts, path))} {self._quote}")
            case "integer" | "number" | "boolean" | "null":
                kept = {name: value for name, value in schema.items() if name in HONOURED[kind]}
                return self._rule("%json " + json.dumps({**kept, "type": kind}))
            case "array":
                return self._array(schema, path)
            case "object":
                return self._object(schema, path)
        raise PromptError(f"The type {kind!r} of `{path}` is none of JSON's.")

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        item = self._value(schema.get("items", {}), f"{path}.items")
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return self._rule('"[" "]"')
        rest = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return self._rule(f'"[" {item} {rest} "]"' if least else f'"[" ({item} {rest})? "]"')

    def _object(self, schema: Mapping[str, Any], path: str) -> str:
        """An object's properties, sorted as chat templates write them, those that are not required or not there."""
        self._check(schema, HONOURED["object"], path)
        listed, others = schema.get("properties") or {}, schema.get("additionalProperties")
        required = set(schema.get("required") or ())
        if not required <= listed.keys():
            raise PromptError(f"`{path}.required` names properties that are not listed; list them.")
        if not listed:
            return self._mapping(others, path)
        if isinstance(others, Mapping) and others:
            raise PromptError(f"The keyword `additionalProperties` of `{path}` cannot be honoured in a call.")
        properties = sorted(listed.items(), key=lambda entry: (entry[0].lower(), entry[0]))
        first, later = '""', '""'  # what follows where no property is written yet, and where one is
        for name, own in reversed(properties):
            written = f"{self._key(name)} {self._value(own, f'{path}.{name}')}"
            begun = self._rule(f"{written} {later}")
            after = self._rule(f'"," {begun}')
            if name in required:
                first, later = begun, after
            else:
                first, later = self._either([begun, first]), self._either([after, later])
        return self._rule(f'"{{" {first} "}}"')

    def _key(self, name: str) -> str:
        if name and not set(name) & set('{}[],":<') and name == name.strip():
            return _text(f"{name}:")
        if "<|" in name:
            raise PromptError(f"The property {name!r} has `<|` in it, which only markers have; rename it.")
        return f'{self._quote} {_text(name)} {self._quote} ":"'

    def _referred(self, target: str, path: str) -> str:
        if target not in self._named:
            schema: Any = self._root
            for part in target.removeprefix("#").strip("/").split("/"):
                if not target.startswith("#/") or not isinstance(schema, Mapping) or part not in schema:
                    raise PromptError(f"`{path}` refers to {target!r}, which the parameters do not have.")
                schema = schema[part]
            self._named[target] = name = self._new_name()
            self.lines.append(f"{name}: {self._value(schema, target)}")
        return self._named[target]

    def _anything(self) -> str:
        if self._any is None:
            self._any = name = self._new_name()
            text = self._rule(f"{self._quote} /{UNMARKED}/ {self._quote}")
            plain = [self._rule("%json " + json.dumps({"type": kind})) for kind in ("number", "boolean", "null")]
            array = self._rule(f'"[" ({name} ("," {name})*)? "]"')
            self.lines.append(f"{name}: {' | '.join([text, *plain, array, self._mapping({}, '')])}")
        return self._any

    def _mapping(self, values: Any, path: str) -> str:
        """An object with properties of any names. values: the schema of theirs; None and True are any."""
        if values is False:
            return self._rule('"{" "}"')
        values = {} if values in (None, True) else values
        item = f'{BARE_KEY} ":" {self._value(values, f"{path}.additionalProperties")}'
        return self._rule(f'"{{" ({item} ("," {item})*)? "}}"')

    def _either(self, rules: list[str]) -> str:
        if not rules:
            raise PromptError("A value of a tool has no choice that it may be; give it one.")
        return rules[0] if len(rules) == 1 else self._rule(" | ".join(rules))

    def _rule(self, body: str) -> str:
        name = self._new_name()
        self.lines.append(f"{name}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        """A rule for a single piece of text, where Lark can ask for several things at once."""
        self._count += 1
        self.lines.append(f"TEXT{self._count}: {body}")
        return f"TEXT{self._count}"

    def _new_name(self) -> str:
        self._count += 1
        return f"r{self._count}"

    def _check(self, schema: Mapping[str, Any], honoured: set[str], path: str) -> None:
        for name in schema:
            if name not in honoured and name not in ALWAYS:
                raise PromptError(f"The keyword `{name}` of `{path}` cannot be honoured in a call; leave it out.")


def _texts(choices: Sequence[Any], path: str) -> list[str]:
    """The choices that are text. Raises PromptError for one that a call cannot have."""
    texts = [choice for choice in choices if isinstance(choice, str)]
    if any("<|" in text for text in texts):
        raise PromptError(f"A choice of `{path}` has `<|` in it, which only markers have; rename it.")
    return texts


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _kinds_of(schema: Mapping[str, Any]) -> list[str]:
    """The types of a schema's choices, where it names none itself."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return sorted({names[type(choice)] for choice in choices if type(choice) in names})
