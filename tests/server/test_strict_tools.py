"""Strict tools where the model may call or not: every call that goes out fits what its tool declares."""

import json
import re
from datetime import date

import pytest
from servers import data_of, user

from mlx_diffusiongemma import Commit, GenerationOptions, generate
from mlx_diffusiongemma.processing.replies import calls_in
from mlx_diffusiongemma.server.work.strict_calls import StrictCalls

QUESTION = "how is lima today?"  # the demo checkpoint answers with a call for this city
FITS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NOT_LIMA = {"type": "object", "properties": {"city": {"enum": ["oslo", "rome"]}}, "required": ["city"]}


def tool(parameters, strict=True, name="get_weather"):
    function = {"name": name, "description": "Get weather", "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


def ask(server, parameters, text=QUESTION, path="/v1/chat/completions", **more):
    """The calls and the text of a reply in any of the three interfaces."""
    function = tool(parameters)["function"]
    bodies = {
        "/v1/chat/completions": {"messages": user(text), "tools": [tool(parameters)], "tool_choice": "auto"},
        "/v1/responses": {"input": user(text), "tools": [{"type": "function", **function}]},
        "/v1/messages": {
            "messages": user(text),
            "tools": [{"name": "get_weather", "input_schema": parameters, "strict": True}],
            "max_tokens": 100,
        },
    }
    reply = server.post(path, **bodies[path], seed=0, **more)
    assert reply.status_code == 200, reply.text
    return reply


def calls_of(path, reply):
    reply = reply.json()
    if path == "/v1/chat/completions":
        message = reply["choices"][0]["message"]
        return [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    if path == "/v1/responses":
        return [json.loads(item["arguments"]) for item in reply["output"] if item["type"] == "function_call"]
    return [block["input"] for block in reply["content"] if block["type"] == "tool_use"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_call_that_does_not_fit_is_written_anew(server, path):
    assert calls_of(path, ask(server, FITS, path=path)) == [{"city": "lima"}]
    (call,) = calls_of(path, ask(server, NOT_LIMA, path=path))
    assert call["city"] in ("oslo", "rome")


def test_a_text_is_written_as_without_strict_tools(server):
    function = {"name": "get_weather", "arguments": '{"city": "lima"}'}
    call = {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    messages = [*user(QUESTION), call, {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]
    body = {"messages": messages, "tools": [tool(NOT_LIMA)], "seed": 0}
    message = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
    own = generate(*server.engine.loaded[:2], messages, tools=[tool(NOT_LIMA, strict=False)], seed=0)
    assert message["content"] == own.text == "lima: rain" and "tool_calls" not in message


@pytest.mark.parametrize("decoder", ["diffusion", "autoregressive", "speculative"])
def test_every_decoders_calls_fit(server, decoder):
    replies = [ask(server, NOT_LIMA, decoder=decoder, max_tokens=60, temperature=1).json() for _ in range(2)]
    first, second = ({**reply["choices"][0]} for reply in replies)
    assert first == second, "the seed gives the same reply again, in one part or two"
    calls = first["message"].get("tool_calls", [])
    assert all(json.loads(call["function"]["arguments"])["city"] in ("oslo", "rome") for call in calls)
    assert calls or decoder != "diffusion"


def test_a_streamed_call_fits_and_the_cost_of_both_parts_counts(server):
    plain = ask(server, FITS).json()
    chunks = data_of(ask(server, NOT_LIMA, stream=True, stream_options={"include_usage": True}))
    (calls,) = [
        delta["tool_calls"]
        for chunk in chunks
        if chunk["choices"] and "tool_calls" in (delta := chunk["choices"][0]["delta"])
    ]
    assert json.loads(calls[0]["function"]["arguments"])["city"] in ("oslo", "rome")
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    spent = chunks[-1]["usage"]
    assert spent["prompt_tokens"] == len(prompt_of(server, NOT_LIMA).tokens)
    assert 0 < spent["completion_tokens"] <= plain["usage"]["completion_tokens"] + 20
    assert chunks[-1]["timings"]["denoising_steps"] > plain["timings"]["denoising_steps"]


def test_a_pattern_and_a_format_hold_in_calls(server):
    properties = {"city": {"type": "string", "pattern": "^[m-z]{4}$"}, "day": {"type": "string", "format": "date"}}
    parameters = {"type": "object", "properties": properties, "required": ["city", "day"]}
    (call,) = calls_of("/v1/chat/completions", ask(server, parameters))
    assert re.fullmatch("[m-z]{4}", call["city"]) and date.fromisoformat(call["day"])


def test_what_a_strict_tool_asks_beyond_the_grammar_is_named(server):
    parameters = {"type": "object", "properties": {"city": {"type": "string", "pattern": "(?=l)"}}}
    body = {"messages": user(QUESTION), "tools": [tool(parameters)], "stream": True}
    reply = server.post("/v1/chat/completions", **body)
    assert reply.status_code == 400 and "pattern" in reply.json()["error"]["message"]


def test_what_says_nothing_of_a_value_is_no_matter(server):
    notes = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "City", "$comment": "of the world"}
    reply = ask(server, {**NOT_LIMA, **notes, "additionalProperties": False})
    assert calls_of("/v1/chat/completions", reply)[0]["city"] in ("oslo", "rome")


def prompt_of(server, parameters, *more):
    return server.engine.loaded.processor.prompt(user(QUESTION), tools=[tool(parameters), *more])


def committed(server, prompt, *canvases):
    """What `StrictCalls` makes of a reply that is committed in these texts."""
    model, processor = server.engine.loaded[:2]
    checking = StrictCalls(model, processor, prompt, GenerationOptions())
    parser = processor.reply_parser(prompt)
    taken = []
    for number, text in enumerate(canvases):
        tokens = processor.tokenizer.encode(text, add_special_tokens=False)
        parts = parser.feed(tokens) + (parser.finish() if number == len(canvases) - 1 else [])
        taken.append(checking.take(Commit(number, tokens, parts, 1, calls_in(parts, 1))))
        if taken[-1][1] is not None:
            break
    return processor.tokenizer.decode(checking.tokens), taken


def written(city, name="get_weather"):
    return f'<|tool_call>call:{name}{{city:<|"|>{city}<|"|>}}<tool_call|>'


def test_a_reply_is_kept_up_to_the_call_that_does_not_fit(server):
    prompt = prompt_of(server, NOT_LIMA, tool(FITS, strict=False, name="loose"))
    good, loose, bad = written("oslo"), written("lima", "loose"), written("lima")
    kept, ((commit, choice),) = committed(server, prompt, f"so {good}{loose} and {bad} b")
    assert kept == f"so {good}{loose} and " and choice == "get_weather"
    assert [kind for kind, _ in commit.parts] == ["text", "tool_call", "tool_call", "text"]
    assert [call.name for call in commit.tool_calls] == ["get_weather", "loose"]


def test_a_call_over_two_canvases_is_cut_where_it_began(server):
    bad = written("lima")
    kept, ((_, first), (commit, choice)) = committed(server, prompt_of(server, NOT_LIMA), f"so {bad[:20]}", bad[20:])
    assert kept == "so " and (first, choice) == (None, "get_weather")
    assert commit.parts == [] and commit.tool_calls == []


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        (written("lima", "unknown"), "required"),
        ("<|tool_call>call:get_weather{city:<tool_call|>", "get_weather"),
        ("<|tool_call>call:loose{city:<tool_call|>", None),
        (written("oslo").removesuffix("<tool_call|>"), None),
        (written("lima").removesuffix("<tool_call|>"), "get_weather"),
        ("no call", None),
    ],
)
def test_what_is_called_instead(server, reply, choice):
    prompt = prompt_of(server, NOT_LIMA, tool(FITS, strict=False, name="loose"))
    _, taken = committed(server, prompt, reply)
    assert taken[-1][1] == choice
