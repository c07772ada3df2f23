"""Objects in tool calls: what is said of their properties holds, or is refused."""

import pytest

from mlx_diffusiongemma import PromptError, load

NUMBERS = {"type": "object", "additionalProperties": {"type": "integer"}}


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def fits(demo, parameters, arguments):
    """Whether a call of a tool with these parameters may have these arguments."""
    model, processor = demo
    prompt = processor.prompt("hi", tools=[{"name": "f", "parameters": parameters}])
    grammar = processor.grammar(prompt, model.options.end_tokens, tool_choice="f")
    call = processor.tokenizer.encode(f"<|tool_call>call:f{arguments}<tool_call|>", add_special_tokens=False)
    return grammar.is_complete(call)


def inside(schema):
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        (inside(NUMBERS), ["{a:{}}", "{a:{x:1,y z:2}}"], ["{a:{x:true}}", "{a:1}", "{}"]),
        (inside({"type": "object", "additionalProperties": False}), ["{a:{}}"], ["{a:{x:1}}"]),
        (inside({"type": "object"}), ["{a:{}}", "{a:{x:[1,{y:null}]}}"], ["{a:1}"]),
        (inside({"type": "object", "additionalProperties": True}), ["{a:{x:1}}"], ["{a:1}"]),
        (NUMBERS, ["{}", "{x:1}"], ["{x:true}"]),
        ({"type": "object", "properties": {}, "additionalProperties": False}, ["{}"], ["{x:1}"]),
        ({"type": "object"}, ["{}"], ["{x:1}"]),
        ({**inside({"type": "null"}), "additionalProperties": True}, ["{a:null}"], ["{a:1}", "{}"]),
        ({**inside({"type": "null"}), "additionalProperties": {}}, ["{a:null}"], ["{a:1}", "{}"]),
    ],
    ids=str,
)
def test_the_properties_of_an_object(demo, parameters, good, bad):
    assert [arguments for arguments in [*good, *bad] if fits(demo, parameters, arguments)] == good


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({**inside({}), **NUMBERS}, "`additionalProperties` of `f.parameters`"),
        (inside({"type": "object", "required": ["x"]}), "`f.parameters.a.required` names properties"),
        ({"type": "object", "required": ["x"]}, "`f.parameters.required` names properties"),
        (inside({"type": "object", "additionalProperties": 3}), "must be a JSON schema, not 3"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(demo, parameters, words):
    with pytest.raises(PromptError, match=words):
        fits(demo, parameters, "{}")
