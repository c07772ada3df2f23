"""Strings that a schema describes, as regular expressions that the whole string matches: patterns and formats.

llguidance makes these of a JSON Schema itself, but only within JSON's quotation marks, which tool calls do not use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import PromptError

STRING_LIMITS = {"minLength", "maxLength", "pattern", "format"}  # what a schema asks of a string, choices aside
UNMARKED = "([^<]|<+[^<|])*<*"  # no marker that is spelled in letters
ANY = "(?s:.*)"

# An escape, a class, or any other character.
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_IN_CLASS = re.compile(r"\\.|[\[&~]", re.DOTALL)


def string_terminal(schema: Mapping[str, Any], choices: Sequence[str] | None, path: str) -> str:
    """Write in Lark what a schema asks of a string, all of it at once.

    choices: what the string may be; None is any text without a marker. path: the way to the schema. Raises PromptError,
    which names the keyword that cannot be honoured.
    """
    from llguidance import regex_to_lark

    expressions, lengths = _expressions(schema, path), _lengths(schema, path)
    if choices is None:
        expressions["type"] = UNMARKED
    if schema.keys() & STRING_LIMITS:
        among = {} if choices is None else {"enum": list(choices)}
        limits = [{"pattern": _anchored(expression)} for expression in expressions.values()]
        if _fault({**among, **lengths, "allOf": limits}):
            raise PromptError(f"`{path}` asks of a text what none in a call can be; ask less of it.")
    if lengths:
        expressions["length"] = f"(?s:.{{{lengths.get('minLength', 0)},{lengths.get('maxLength', '')}}})"
    parts = [f"/{regex_to_lark(f'(?:{expression})', 'dw')}/" for expression in expressions.values()]
    if choices is not None:
        parts.append(f"({' | '.join(json.dumps(choice, ensure_ascii=False) for choice in choices)})")
    return " & ".join(parts)


def _expressions(schema: Mapping[str, Any], path: str) -> dict[str, str]:
    """What the whole string has to match, by the keyword that asks for it."""
    found = {}
    if "pattern" in schema:
        if not isinstance(schema["pattern"], str):
            raise PromptError(f"The `pattern` of `{path}` must be a regular expression, not {schema['pattern']!r}.")
        _check("pattern", {"pattern": portable(schema["pattern"])}, path)  # as it is, before it is taken apart
        found["pattern"] = whole(schema["pattern"])
        _check("pattern", {"pattern": _anchored(found["pattern"])}, path)
    if "format" in schema:
        if schema["format"] not in [*FORMATS]:
            known = ", ".join(FORMATS)
            raise PromptError(f"The `format` of `{path}` is {schema['format']!r}; in a call, it can be {known}.")
        found["format"] = FORMATS[schema["format"]]
    return found


def _lengths(schema: Mapping[str, Any], path: str) -> dict[str, int]:
    found = {name: schema[name] for name in ("minLength", "maxLength") if name in schema}
    for name, value in found.items():
        _check(name, {name: value}, path)
    return found


def _check(name: str, asked: Mapping[str, Any], path: str) -> None:
    if reason := _fault(asked):
        raise PromptError(f"The keyword `{name}` of `{path}` cannot be honoured in a call ({reason}); leave it out.")


def _fault(asked: Mapping[str, Any]) -> str:
    """What llguidance says against what is asked of a string; nothing where it can be one."""
    from llguidance import LLMatcher

    schema = {"type": "string", **asked}
    found = LLMatcher.validate_grammar(json.dumps({"grammars": [{"json_schema": schema}]}), None)
    return " ".join(found.split())[:200].rstrip(".")


def _anchored(expression: str) -> str:
    return f"^(?:{expression})$"


def portable(pattern: str) -> str:
    """Write a pattern so that Rust, whose expressions llguidance reads, takes it as everybody else does: there, a class
    may hold classes and set operators.
    """
    return "".join(_pieces(pattern))


def whole(pattern: str) -> str:
    """Write a pattern, which any part of a string may match, as an expression that all of the string matches.

    Anchors are resolved where an alternative begins or ends with one, also within a group that is the whole of it.
    Those elsewhere stay: nothing is before or after them, or llguidance refuses them.
    """
    return _whole(_pieces(pattern))


def _pieces(pattern: str) -> list[str]:
    return [_plain_class(piece) if len(piece) > 1 and piece[0] == "[" else piece for piece in _PIECE.findall(pattern)]


def _plain_class(written: str) -> str:
    return "[" + _IN_CLASS.sub(lambda found: found[0] if len(found[0]) > 1 else f"\\{found[0]}", written[1:])


def _whole(pieces: Sequence[str]) -> str:
    return "|".join(map(_whole_alternative, _alternatives(pieces)))


def _whole_alternative(pieces: Sequence[str]) -> str:
    if (inner := _only_group(pieces)) is not None:
        return f"(?:{_whole(inner)})"
    first, last = pieces[:1] == ["^"], pieces[-1:] == ["$"]
    body = "".join(pieces[first : len(pieces) - last])
    return f"{'' if first else ANY}{body}{'' if last else ANY}"


def _alternatives(pieces: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    depth = 0
    for piece in pieces:
        depth += (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0:
            found.append([])
        else:
            found[-1].append(piece)
    return found


def _only_group(pieces: Sequence[str]) -> Sequence[str] | None:
    """What is in the group that an alternative consists of; None where it does not."""
    depth = 0
    for place, piece in enumerate(pieces, 1):
        depth += (piece == "(") - (piece == ")")
        if depth == 0 and place < len(pieces):
            return None
    if pieces[:1] != ["("] or pieces[-1:] != [")"]:
        return None
    if pieces[1:3] == ["?", ":"]:
        return pieces[3:-1]
    return None if pieces[1:2] == ["?"] else pieces[1:-1]


def _date() -> str:
    """RFC 3339's full-date, with the days that each month of each year has, from the year 1 on, as calendars count."""
    year = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
    fourth = "(?:0[48]|[2468][048]|[13579][26])"
    leap = f"(?:[0-9]{{2}}{fourth}|{fourth}00)"
    days = "(?:0[1-9]|1[0-9]|2[0-8])"
    every = f"(?:0[1-9]|1[0-2])-{days}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31"
    return f"(?:{year}-(?:{every})|{leap}-02-29)"


def _time() -> str:
    """RFC 3339's full-time, without leap seconds."""
    minutes = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
    return rf"(?:{minutes}:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-]{minutes}))"


def _duration() -> str:
    """RFC 3339's appendix A: units from a larger to a smaller one, none left out between two."""

    def descending(units: str) -> str:
        following = ""
        found = []
        for unit in reversed(units):
            found.append(f"[0-9]+{unit}{following}")
            following = f"(?:{found[-1]})?"
        return f"(?:{'|'.join(found)})"

    time = f"T{descending('HMS')}"
    return f"(?:P(?:{descending('YMD')}(?:{time})?|{time}|[0-9]+W))"


def _ipv6() -> str:
    """RFC 4291's text form in hexadecimal: eight groups, or fewer around a `::`."""
    group = "[0-9a-fA-F]{1,4}"
    shortened = []
    for before in range(8):
        left = f"{group}(?::{group}){{{before - 1}}}" if before else ""
        right = f"(?:{group}(?::{group}){{0,{6 - before}}})?" if before < 7 else ""
        shortened.append(f"{left}::{right}")
    return f"(?:{group}(?::{group}){{7}}|{'|'.join(shortened)})"


def _uri(ipv4: str, ipv6: str) -> str:
    """RFC 3986's URI."""
    letters = r"A-Za-z0-9\-._~!$&'()*+,;="
    byte = "%[0-9A-Fa-f]{2}"

    def text(more: str, count: str) -> str:
        return f"(?:[{letters}{more}]|{byte}){count}"

    future = rf"v[0-9A-Fa-f]+\.[{letters}:]+"
    host = rf"(?:\[(?:{ipv6}|{future})\]|{ipv4}|{text('', '*')})"
    authority = f"(?:{text(':', '*')}@)?{host}(?::[0-9]*)?"
    segment, rest = text(":@", "+"), f"(?:/{text(':@', '*')})*"
    path = f"(?://{authority}{rest}|/(?:{segment}{rest})?|{segment}{rest}|)"
    after = text(":@/?", "*")
    return rf"(?:[A-Za-z][A-Za-z0-9+\-.]*:{path}(?:\?{after})?(?:#{after})?)"


def _formats() -> dict[str, str]:
    byte = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
    ipv4 = rf"(?:(?:{byte}\.){{3}}{byte})"
    label = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    hostname = rf"(?:{label}(?:\.{label})*)"
    atom = r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~]+"
    hexadecimal = "[0-9a-fA-F]"
    return {
        "date": _date(),
        "time": _time(),
        "date-time": f"(?:{_date()}[tT]{_time()})",
        "duration": _duration(),
        "email": rf"(?:{atom}(?:\.{atom})*@(?:{hostname}|\[{ipv4}\]))",
        "hostname": hostname,
        "ipv4": ipv4,
        "ipv6": _ipv6(),
        "uri": _uri(ipv4, _ipv6()),
        "uuid": f"(?:{hexadecimal}{{8}}(?:-{hexadecimal}{{4}}){{3}}-{hexadecimal}{{12}})",
    }


FORMATS = _formats()
