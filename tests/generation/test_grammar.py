"""Replies that follow a grammar: valid whatever the model would have said, the same with drafts and without."""

import asyncio
import builtins
import json
import sys
import threading
from dataclasses import replace
from unittest.mock import patch

import jsonschema
import pytest
from random_schemas import random_schema
from test_speculative import drafts_of

from mlx_diffusiongemma import (
    Canvas,
    CanvasError,
    ChatSession,
    GenerationOptions,
    PromptError,
    agenerate,
    generate,
    generate_batch,
    load,
    stream,
)
from mlx_diffusiongemma.events import Commit, Done, Draft
from mlx_diffusiongemma.generation.decoders import guided
from mlx_diffusiongemma.generation.decoders.grammar import Guide
from mlx_diffusiongemma.options import DECODERS

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]{1,6}$"}, "age": {"enum": [11, 12, 125]}},
    "required": ["name", "age"],
}
LEFT_TO_RIGHT = GenerationOptions(decoder="autoregressive", seed=3, max_tokens=80)
GREEDY = replace(LEFT_TO_RIGHT, temperature=0.0)
QUESTION = "json name=bob age=12"


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


@pytest.mark.parametrize("decoder", DECODERS)
def test_replies_are_valid(demo, decoder):
    for seed in range(DECODERS.index(decoder), 40, len(DECODERS)):
        schema = random_schema(seed)
        options = GenerationOptions(decoder=decoder, seed=seed, max_tokens=1500)
        result = generate(*demo, QUESTION, schema=schema, options=options)
        assert result.finish_reason == "stop" and result.note == ""
        jsonschema.Draft202012Validator(schema).validate(json.loads(result.text))
        assert result.data == json.loads(result.text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 1), (16, 1), (40, 2)], ids=str)
def test_drafts_change_nothing_but_the_cost(demo, shape, temperature):
    for seed in range(2):
        schema = random_schema(seed)
        options = replace(LEFT_TO_RIGHT, seed=seed, temperature=temperature, max_tokens=50)
        expected = generate(*demo, QUESTION, schema=schema, options=options)
        for decoder in ("speculative", "diffusion"):
            with drafts_of(*shape):
                result = generate(*demo, QUESTION, schema=schema, options=replace(options, decoder=decoder))
            assert (result.tokens, result.finish_reason) == (expected.tokens, expected.finish_reason)
            assert result.stats.passes <= expected.stats.passes


def test_what_the_schema_fixes_costs_no_pass(demo):
    schema = {
        "type": "object",
        "properties": {"the first name": {"enum": ["bob", "alice"]}, "is it a customer": {"type": "boolean"}},
        "required": ["the first name", "is it a customer"],
    }
    for decoder in DECODERS:
        result = generate(*demo, QUESTION, schema=schema, options=replace(GREEDY, decoder=decoder))
        assert 4 * result.stats.passes <= len(result.tokens)
    fixed = generate(*demo, QUESTION, schema={"const": {"a": [1, "two"]}}, options=GREEDY)
    assert fixed.data == {"a": [1, "two"]} and fixed.stats.passes == 0


def test_the_canvas_drafts_the_whole_object(demo):
    with drafts_of(64, 2):
        events = list(stream(*demo, QUESTION, schema=PERSON, options=replace(GREEDY, decoder="diffusion")))
    drafts = [event for event in events if isinstance(event, Draft) and event.canvas == 1]
    text = "".join(event.text for event in events if isinstance(event, Commit))
    assert [draft.step for draft in drafts] == [1, 2, 3]
    first = next(event for event in events if isinstance(event, Commit)).text
    assert '", "age": ' in first + drafts[0].text, "what the schema fixes is in the first draft"
    commit = next(event for event in events if isinstance(event, Commit) and event.canvas == 1)
    assert drafts[-1].tokens[: len(commit.tokens)] == commit.tokens
    assert all(len(draft.tokens) == len(draft.accepted) == len(draft.entropy) for draft in drafts)
    assert json.loads(text) == events[-1].data


def test_a_draft_that_is_right_is_read_in_one_pass(demo):
    """The causal pass made to prefer what is there: all that it reads is kept, whatever it is."""
    model, processor = demo
    expected = generate(model, processor, QUESTION, schema=PERSON, options=GREEDY)

    walk = guided._Row.walk

    def right(row, best, correct):
        return walk(row, [*row.known, *expected.tokens[len(row.writer.tokens) :], *best][: len(best)], correct)

    with drafts_of(60, 1), patch.object(guided._Row, "walk", right):
        result = generate(model, processor, QUESTION, schema=PERSON, options=replace(GREEDY, decoder="speculative"))
    assert result.tokens == expected.tokens and result.stats.passes == 1 < expected.stats.passes


def test_too_few_tokens_are_no_value(demo):
    whole = generate(*demo, QUESTION, schema=PERSON, options=GREEDY)
    for decoder in DECODERS:
        for count in (1, 12, len(whole.tokens) - 1):
            options = replace(GREEDY, decoder=decoder, max_tokens=count)
            cut = generate(*demo, QUESTION, schema=PERSON, options=options)
            assert cut.tokens == whole.tokens[:count] and cut.finish_reason == "length" and cut.data is None
            assert "raise max_tokens" in cut.note
        options = replace(GREEDY, decoder=decoder, max_tokens=len(whole.tokens))
        assert generate(*demo, QUESTION, schema=PERSON, options=options).data == whole.data


def test_a_stop_string_leaves_no_value(demo):
    result = generate(*demo, QUESTION, schema=PERSON, options=replace(GREEDY, stop=('"age',)))
    assert result.finish_reason == "stop" and result.data is None and "before it was what was asked for" in result.note


def test_regular_expressions_and_lark(demo):
    assert generate(*demo, "sort 53142", grammar="[0-9]{5}", options=GREEDY).text.isdigit()
    lark = 'start: "x" VALUE\nVALUE: /[a-c]{3}/'
    result = generate(*demo, "sort 53142", grammar=lark, options=GREEDY)
    assert (
        result.text[0] == "x" and len(result.text) == 4 and set(result.text[1:]) <= set("abc") and result.data is None
    )


def test_a_thought_comes_before_the_grammar(demo):
    schema = {"type": "integer", "minimum": 0, "maximum": 99999}
    for decoder in DECODERS:
        options = replace(GREEDY, decoder=decoder)
        result = generate(*demo, "sort 53142", thinking=True, schema=schema, options=options)
        if result.finish_reason == "stop":
            assert isinstance(result.data, int) and result.text == str(result.data)
        else:
            assert result.data is None


def test_a_thought_ends_where_the_grammar_begins(demo):
    model, processor = demo
    prompt = processor.prompt("sort 53142", thinking=True)
    begin, end = (processor.tokenizer.convert_tokens_to_ids(name) for name in ("<|channel>", "<channel|>"))
    grammar = processor.grammar(prompt, model.options.end_tokens, schema={"type": "integer"})
    thought = processor.tokenizer.encode("thought\n53142 has {5}\n", add_special_tokens=False)
    number = processor.tokenizer.encode("12345", add_special_tokens=False)
    reply = [begin, *thought, end, *number]
    assert grammar.is_complete(reply) and grammar.value(reply) == 12345
    assert grammar.is_complete(number) and not grammar.is_complete(reply[:-5]) and not grammar.is_complete(thought)
    plain = processor.grammar(processor.prompt("sort 53142"), model.options.end_tokens, schema={"type": "integer"})
    assert not plain.is_complete(reply) and plain.is_complete([begin, *thought[:8], end, *number])


@pytest.mark.parametrize("decoder", ["autoregressive", "diffusion"])
def test_in_a_batch_each_reply_is_the_one_that_it_is_alone(demo, decoder):
    prompts = [f"json name={name} age=4{place}" for place, name in enumerate(("bob", "li", "alexandra", "jo", "max"))]
    options = replace(LEFT_TO_RIGHT, decoder=decoder, temperature=1.0)
    for result in generate_batch(*demo, prompts, schema=PERSON, options=options, rows=3):
        alone = generate(*demo, prompts[result.index], schema=PERSON, options=options, seed=result.seed)
        assert (alone.tokens, alone.data, alone.stats.passes) == (result.tokens, result.data, result.stats.passes)


def test_in_a_batch_each_prompt_calls_its_own_tools(demo):
    _, processor = demo
    prompts = [processor.prompt(text, tools=tools) for text, tools in (("a", [FIND]), ("bc", [get_weather, FIND]))]
    options = GenerationOptions(max_tokens=60)
    for choice in ("find", "required"):
        for result in generate_batch(*demo, prompts, tool_choice=choice, options=options, seed=4):
            alone = generate(*demo, prompts[result.index], tool_choice=choice, options=options, seed=result.seed)
            assert (result.tokens, result.tool_calls) == (alone.tokens, alone.tool_calls)
            assert result.finish_reason == "length" or result.tool_calls[0].name in ("find", "get_weather")
    for wrong, words in (({"tool_choice": "look"}, "'required' or one of find"), ({"schema": {}}, "give only one")):
        with pytest.raises(PromptError, match=words):
            generate_batch(*demo, prompts, **{"tool_choice": "find", **wrong})
    with pytest.raises(PromptError, match="there are none"):
        generate_batch(*demo, [*prompts, "no tools"], tool_choice="find")


def test_a_repetition_penalty_and_a_kept_prefix(demo):
    model, _ = demo
    options = replace(GREEDY, repetition_penalty=1.3)
    expected = generate(*demo, QUESTION, schema=PERSON, options=options)
    cache = model.make_cache()
    for _ in range(2):
        with drafts_of(30, 2):
            found = generate(
                *demo, QUESTION, schema=PERSON, options=replace(options, decoder="speculative"), cache=cache
            )
        assert found.tokens == expected.tokens and len(cache.labels) == cache.offset


def test_a_grammar_is_compiled_once(demo):
    model, processor = demo
    first, second = (
        processor.grammar(processor.prompt(text), model.options.end_tokens, schema=PERSON) for text in ("a", "b")
    )
    assert first is second
    prompts = [processor.prompt("a", tools=tools) for tools in ([FIND], [FIND], [get_weather, FIND])]
    made = [processor.grammar(prompt, model.options.end_tokens, tool_choice="find") for prompt in prompts]
    assert made[0] is made[1] is not made[2]
    endless: dict = {"items": {}}
    endless["items"] = endless
    with pytest.raises(PromptError, match="cannot be written as JSON"):
        processor.grammar(processor.prompt("a"), model.options.end_tokens, schema=endless)


def test_sessions_and_async_code_take_schemas(demo):
    session = ChatSession(*demo, options=GREEDY)
    result = session.ask(QUESTION, schema=PERSON)
    assert json.loads(result.text) == result.data == generate(*demo, QUESTION, schema=PERSON, options=GREEDY).data
    assert session.messages[-1] == {"role": "assistant", "content": result.text}
    assert asyncio.run(agenerate(*demo, QUESTION, schema=PERSON, options=GREEDY)).data == result.data


def test_cancelling_leaves_the_cache_usable(demo):
    model, _ = demo
    options = replace(GREEDY, decoder="speculative")
    with drafts_of(20, 2):
        whole = list(stream(*demo, QUESTION, schema=PERSON, options=options))
    last = max(number for number, event in enumerate(whole) if isinstance(event, Draft))
    for at in range(1, last + 1):  # while there is a draft to come
        cache, cancel = model.make_cache(), threading.Event()
        seen = []
        with drafts_of(20, 2):
            for event in stream(*demo, QUESTION, schema=PERSON, options=options, cache=cache, cancel=cancel):
                seen.append(event)
                if len(seen) == at:
                    cancel.set()
        assert isinstance(seen[-1], Done) and seen[-1].finish_reason == "cancelled" and seen[-1].data is None
        assert len(cache.labels) == cache.offset


def get_weather(city: str, days: int = 1):
    """The weather.

    Args:
        city: Where.
        days: For how long.
    """


FIND = {
    "name": "find",
    "parameters": {
        "type": "object",
        "properties": {
            "words": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
            "deep": {"type": "boolean"},
            "max-n": {"type": "integer", "minimum": 1, "maximum": 9},
            "how": {"type": "object", "properties": {"k": {"type": "string", "maxLength": 3}}, "required": ["k"]},
        },
        "required": ["words", "how"],
    },
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_tool_can_be_required(demo, decoder):
    for seed in range(2):
        options = GenerationOptions(decoder=decoder, seed=seed, max_tokens=120)
        result = generate(*demo, "hi", tools=[get_weather, FIND], tool_choice="find", options=options)
        assert [call.name for call in result.tool_calls] == ["find"] and result.finish_reason == "tool"
        jsonschema.Draft202012Validator(FIND["parameters"]).validate(result.tool_calls[0].arguments)
        assert result.text == ""
        result = generate(*demo, "hi", tools=[FIND, get_weather], tool_choice="required", options=options)
        assert result.tool_calls or result.finish_reason == "length"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"schema": {"not": {}}}, "`not` of `schema`"),
        (
            {"schema": {"properties": {"a": {"type": "string", "nullable": True}}}},
            "`nullable` of `schema.properties.a`",
        ),
        ({"schema": {"type": "array", "uniqueItems": True}}, "`uniqueItems`"),
        ({"schema": {"type": "string", "pattern": "a(?=b)"}}, "`pattern` of the schema"),
        ({"schema": {"type": "string", "format": "nonsense"}}, "Unknown format: nonsense"),
        ({"schema": {"type": "integer", "exclusiveMinimum": True}}, "must be a number, not True"),
        ({"schema": {"exclusiveMinimum": 0, "maximum": 0.5}}, "`exclusiveMinimum` of `schema`"),
        ({"schema": {"type": "array", "items": [{"type": "null"}]}}, "`schema.items` must be a JSON schema"),
        ({"schema": {"$ref": "#/$defs/x"}}, "does not exist"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum .5. is greater"),
        ({"schema": [1]}, "not a list"),
        ({"schema": {"const": {1}}}, "cannot be written as JSON"),
        ({"schema": {}, "grammar": "a"}, "give only one"),
        ({"grammar": "("}, "The grammar cannot be honoured"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": " "}, "takes a regular expression or a Lark grammar"),
        ({"tool_choice": "required"}, "there are none"),
        ({"tools": [FIND], "tool_choice": "look"}, "'required' or one of find"),
        ({"schema": {}, "options": GenerationOptions(end_tokens=())}, "end_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(demo, asked, words):
    with pytest.raises(PromptError, match=words):
        stream(*demo, "hi", **asked)


def test_a_canvas_cannot_follow_a_grammar(demo):
    with pytest.raises(CanvasError, match="cannot follow a grammar"):
        stream(*demo, "hi", schema={}, canvas=Canvas([5]))


def test_without_llguidance_a_sentence_says_what_to_install(demo):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.split(".")[0] == "llguidance":
            raise ImportError(name=name)
        return real(name, *rest, **more)

    with patch.dict(sys.modules), patch.object(builtins, "__import__", missing):
        sys.modules.pop("llguidance", None)
        with pytest.raises(PromptError, match=r"pip install 'mlx-diffusiongemma\[grammar\]'"):
            stream(*demo, "hi", schema={"type": "null"})
        assert generate(*demo, "hi", max_tokens=1).tokens is not None


def test_a_grammar_that_is_too_much_to_follow_is_an_error(demo):
    model, processor = demo
    grammar = processor.grammar(processor.prompt("hi"), model.options.end_tokens, schema={"type": "null"})
    with pytest.raises(PromptError, match="cannot be followed"):
        Guide(grammar.matcher()).take([40])
