"""Strings in tool calls: they come out as a pattern, a format, a length and choices demand, all at once."""

import json
import re
import warnings
from datetime import date

import jsonschema
import pytest
from llguidance import LLMatcher

from mlx_diffusiongemma import GenerationOptions, PromptError, generate, load
from mlx_diffusiongemma.processing.grammars.strings import FORMATS, portable, whole
from mlx_diffusiongemma.processing.tools import parse_tool_calls

TEXTS = ["", "a", "b", "ab", "abc", "ba", "cab", "12", "123-45", "1234", "<", "<=", "a<b", "<b>hi</b>", "é", "A", "Abc"]
TEXTS += [
    "a\nb",
    "[",
    "]",
    "a]",
    "[a]",
    "&",
    "~",
    "foo/bar",
    "cat",
    "catdog",
    "a.b",
    " ",
    "a b",
    "\\",
    'q"',
    "{a:1}",
    "|",
]
PATTERNS = ["", "^", "$", "^$", "a", "^a", "b$", "^a|b$", "a|^$", "^(a|b)$", "^(?:a|b)c?$", "(^a$)|(^b$)", "((^a)|b$)"]
PATTERNS += [r"^\d{3}-\d{2}$", r"^[A-Z]\w{0,3}$", "^.{1,3}$", "^<b>.*</b>$", "^(<|<=|>)$", "foo/bar", "[&~]", r"^\S+$"]
PATTERNS += [
    r"^[^[\]]$",
    "^[[a]]$",
    r"\.",
    "^[^a]*$",
    "^(cat|dog)(cat|dog)?$",
    "[]a]",
    r"\\$",
    r"^\w\|?$",
    "^(a)|(b)$",
    r"\$",
]
VALID = {
    "date": ["2024-02-29", "2000-02-29", "1999-12-31", "2023-04-30", "0001-01-01", "0004-02-29"],
    "time": ["00:00:00Z", "23:59:59.25+05:30", "12:00:00z"],
    "date-time": ["2024-02-29T10:11:12Z", "1999-12-31t23:59:59.5-08:00"],
    "duration": ["P1Y", "P1Y2M3D", "P1DT2H", "PT1H2M3S", "PT5S", "P3W", "P2M1DT4M"],
    "email": ["a@b", "first.last+tag@mail.example.org", "x@[127.0.0.1]"],
    "hostname": ["a", "example.org", "x-1.y2.z"],
    "ipv4": ["0.0.0.0", "255.249.199.9"],
    "ipv6": ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "fe80::1:2", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8"],
    "uri": [
        "http://a",
        "https://u:p@h.org:80/a/b?q=1&r#f",
        "urn:x:1",
        "http://[::1]/",
        "mailto:a@b",
        "file:///x",
        "a:",
    ],
    "uuid": ["01234567-89ab-cdef-0123-456789ABCDEF"],
}
INVALID = {
    "date": [
        "2023-02-29",
        "1900-02-29",
        "2023-04-31",
        "2023-13-01",
        "2023-00-01",
        "2023-1-01",
        "2023-02-30",
        "0000-01-01",
    ],
    "time": ["24:00:00Z", "12:60:00Z", "12:00:00", "1:00:00Z"],
    "date-time": ["2024-02-29 10:11:12Z", "2024-02-29"],
    "duration": ["P", "PT", "P1", "P1Y3D", "P1W2D", "PT1H3S", "1Y", "P1DT"],
    "email": ["a", "@b", "a@", "a..b@c", ".a@b", "a@-b", "a b@c"],
    "hostname": ["", "-a", "a-", "a..b", "a_b", "x" * 64],
    "ipv4": ["1.2.3", "256.1.1.1", "01.1.1.1", "1.2.3.4.5"],
    "ipv6": ["", ":", ":::", "1:2:3:4:5:6:7", "1::2::3", "12345::", "1:2:3:4:5:6:7:8::", "::1:2:3:4:5:6:7:8", "g::"],
    "uri": ["", "a", "//a", "http://a b", "1a:b", "http://[1::2::3]/", "a:%zz", "http://a:b:c/", "a:<b>"],
    "uuid": ["01234567-89ab-cdef-0123-456789ABCDE", "0123456789abcdef0123456789ABCDEF"],
}


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def tool(schema):
    return {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}


def fits(demo, schema, text):
    """Whether a call may have `text` where the schema is, and comes out of the parser with it."""
    model, processor = demo
    prompt = processor.prompt("hi", tools=[tool(schema)])
    grammar = processor.grammar(prompt, model.options.end_tokens, tool_choice="f")
    body = f'call:f{{a:<|"|>{text}<|"|>}}'
    assert parse_tool_calls(body)[0].arguments == {"a": text}
    call = processor.tokenizer.encode(f"<|tool_call>{body}<tool_call|>", add_special_tokens=False)
    return grammar.is_complete(call)


def searched(pattern, text):
    """What the standard says of a pattern: it matches somewhere, and `$` is the end alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return re.search(re.sub(r"(?<!\\)\$", r"\\Z", pattern), text, re.ASCII) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_what_a_search_finds(demo, pattern):
    expected = [text for text in TEXTS if searched(pattern, text)]
    assert [text for text in TEXTS if fits(demo, {"type": "string", "pattern": pattern}, text)] == expected
    assert [text for text in TEXTS if re.fullmatch(portable(whole(pattern)), text, re.ASCII)] == expected
    assert portable(portable(pattern)) == portable(pattern)


def test_the_formats_are_those_of_plain_schemas():
    def known(name):
        schema = {"type": "string", "format": name}
        return not LLMatcher.validate_grammar(json.dumps({"grammars": [{"json_schema": schema}]}), None)

    assert all(map(known, FORMATS)) and VALID.keys() == INVALID.keys() == FORMATS.keys()
    standard = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
    others = ("idn-email", "idn-hostname", "uri-reference", "iri", "uri-template", "json-pointer", "regex")
    assert FORMATS.keys() == set(standard) and not any(map(known, others))


@pytest.mark.parametrize("name", FORMATS)
def test_formats(demo, name):
    schema = {"type": "string", "format": name}
    assert [text for text in VALID[name] if not fits(demo, schema, text)] == []
    assert [text for text in INVALID[name] if fits(demo, schema, text)] == []
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    assert all(checker.conforms(text, name) for text in VALID[name])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"pattern": "^a", "maxLength": 2}, ["a", "ab", "a]"]),
        ({"pattern": "b", "minLength": 3, "maxLength": 3}, ["abc", "cab", "a<b", "Abc", "a\nb", "a.b", "a b"]),
        ({"enum": ["a", "ab", "b"], "pattern": "^a"}, ["a", "ab"]),
        ({"enum": ["a", "abc"], "minLength": 2}, ["abc"]),
        ({"enum": ["", "12"]}, ["", "12"]),
        ({"const": "<"}, ["<"]),
        ({"maxLength": 0}, [""]),
        ({"minLength": 4, "maxLength": 5}, ["1234", "{a:1}"]),
        ({"pattern": "^[a-z]+$", "format": "hostname", "maxLength": 2}, ["a", "b", "ab", "ba"]),
        ({"type": ["string", "null"], "pattern": "^(cat|dog)"}, ["cat", "catdog"]),
    ],
    ids=str,
)
def test_all_that_is_asked_holds_at_once(demo, asked, expected):
    assert [text for text in TEXTS if fits(demo, {"type": "string", **asked}, text)] == expected


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"pattern": "a(?=b)"}, "`pattern` of `f.parameters.a`"),
        ({"pattern": r"\ba"}, "`pattern` of `f.parameters.a`"),
        ({"pattern": "(^a|b)c"}, "`pattern` of `f.parameters.a`"),
        ({"pattern": "a)(b"}, "unopened group"),
        ({"pattern": "(" * 2000 + ")" * 2000}, "`pattern` of"),
        ({"pattern": 3}, "regular expression, not 3"),
        ({"pattern": "^abc$", "maxLength": 2}, "none in a call can be"),
        ({"pattern": r"<\|"}, "none in a call can be"),
        ({"enum": ["a"], "pattern": "b"}, "none in a call can be"),
        ({"format": "regex"}, "'regex'; in a call, it can be date, time"),
        ({"format": ["date"]}, "in a call, it can be"),
        ({"minLength": -1}, "`minLength` of `f.parameters.a`"),
        ({"maxLength": 2.5}, "`maxLength` of `f.parameters.a`"),
        ({"type": "integer", "format": "int32"}, "`format` of `f.parameters.a`"),
        ({"type": "integer", "enum": ["a"]}, "no choice that it may be"),
        ({"$ref": "#/properties/a", "pattern": "a"}, "`pattern` of `f.parameters.a`"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_honoured_is_refused_by_name(demo, schema, words):
    with pytest.raises(PromptError, match=words):
        fits(demo, {"type": "string", **schema}, "a")


def test_a_date_is_one_that_the_calendar_has():
    days = [
        f"{year:04}-{month:02}-{day:02}"
        for year in (0, 1, 4, 100, 400, 1900, 2000, 2023, 2024)
        for month in range(14)
        for day in range(33)
    ]
    for day in days:
        try:
            known = bool(date.fromisoformat(day))
        except ValueError:
            known = False
        assert bool(re.fullmatch(FORMATS["date"], day)) == known, day


def test_of_several_types_those_that_have_a_choice(demo):
    schema = {"type": ["string", "null", "integer"], "enum": ["a"]}
    model, processor = demo
    prompt = processor.prompt("hi", tools=[tool(schema)])
    grammar = processor.grammar(prompt, model.options.end_tokens, tool_choice="f")
    call = processor.tokenizer.encode("<|tool_call>call:f{a:null}<tool_call|>", add_special_tokens=False)
    assert fits(demo, schema, "a") and not grammar.is_complete(call)


@pytest.mark.parametrize("decoder", ["diffusion", "autoregressive"])
def test_what_the_model_writes_fits(demo, decoder):
    properties = {
        "code": {"type": "string", "pattern": r"^[A-Z]{2}-\d{2,4}$"},
        "on": {"type": "string", "format": "date"},
        "who": {
            "type": "array",
            "items": {"type": "string", "pattern": "b", "maxLength": 5},
            "minItems": 1,
            "maxItems": 2,
        },
    }
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    for seed in range(5):
        options = GenerationOptions(decoder=decoder, seed=seed, max_tokens=120, temperature=1.0)
        tools = [{"name": "f", "parameters": parameters}]
        (call,) = generate(*demo, "json name=bob", tools=tools, tool_choice="f", options=options).tool_calls
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(parameters, format_checker=checker).validate(call.arguments)
