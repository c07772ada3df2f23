"""OpenAI's interfaces, asked by the official client, every event checked strictly against its types."""

import base64
import json
from pathlib import Path
from typing import Literal

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter
from servers import data_of, user

from mlx_diffusiongemma import GenerationOptions, generate

IMAGE = Path(__file__).parents[1] / "data" / "tiny" / "eval" / "images" / "002.png"
WEATHER = {
    "name": "get_weather",
    "description": "Get weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
FEW = {"max_steps": 2}
EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_a_chat_is_answered_as_the_library_answers(server, client):
    reply = client.chat.completions.create(model="gpt-any", messages=user("reverse abcdef"), seed=7)
    ChatCompletion.model_validate(reply.model_dump(), strict=True)
    assert reply.choices[0].message.content == "fedcba" and reply.choices[0].finish_reason == "stop"
    assert reply.model == "demo" and reply.id.startswith("chatcmpl-")
    own = generate(*server.engine.loaded[:2], "reverse abcdef", seed=7)
    assert own.text == "fedcba" and own.stats.generated_tokens == reply.usage.completion_tokens


def test_a_stream_appends(server):
    body = {"messages": user("count from 17"), "stream": True, "stream_options": {"include_usage": True}, "seed": 1}
    response = server.post("/v1/chat/completions?x=1", **body)
    assert response.text.endswith("\n\ndata: [DONE]\n\n")
    chunks = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in data_of(response)]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert all(delta.tool_calls is None for delta in deltas)
    text = "".join(delta.content or "" for delta in deltas)
    assert text == generate(*server.engine.loaded[:2], "count from 17", seed=1).text
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def test_drafts_replace_each_other_where_they_are_asked_for(server):
    body = {"messages": user("count from 17"), "stream": True, "seed": 1}
    plain = [
        chunk["choices"][0]["delta"].get("content") for chunk in data_of(server.post("/v1/chat/completions", **body))
    ]
    drafts = [
        chunk["choices"][0]["delta"].get("content")
        for chunk in data_of(server.post("/v1/chat/completions", **body, diffusing=True))
    ]
    assert drafts[-2] == "".join(filter(None, plain))
    assert len(drafts) > len(plain) and len(set(drafts)) > 2


def test_a_frame_tells_of_each_step(server):
    body = {"messages": user("count from 17"), "stream": True, "seed": 1, "frames": True}
    chunks = data_of(server.post("/v1/chat/completions", **body))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    frames = [chunk for chunk in chunks if chunk.get("type") == "diffusion_frame"]
    assert all(frame["choices"][0]["delta"] == {} for frame in frames)
    assert [frame["step"] for frame in frames if frame["block"] == 0] == list(
        range(1, 1 + sum(frame["block"] == 0 for frame in frames))
    )
    assert all(len(frame["pieces"]) == len(frame["accepted"]) == len(frame["entropy"]) for frame in frames)
    assert frames[-1]["text"] and sum(frames[-1]["entropy"]) < sum(frames[0]["entropy"])


def test_a_tool_is_called_and_its_answer_read(server, client):
    tools = [{"type": "function", "function": WEATHER}]
    messages = user("how is lima today?")
    reply = client.chat.completions.create(model="", messages=messages, tools=tools, tool_choice="auto", seed=0)
    ChatCompletion.model_validate(reply.model_dump(), strict=True)
    (call,) = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "lima"})
    answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [*messages, reply.choices[0].message.model_dump(exclude_none=True), answer]
    reply = client.chat.completions.create(model="", messages=messages, tools=tools, seed=0)
    assert reply.choices[0].message.content == "lima: rain"


def test_a_streamed_call_is_whole(server):
    body = {"messages": user("how is lima today?"), "tools": [{"type": "function", "function": WEATHER}], "seed": 0}
    chunks = data_of(server.post("/v1/chat/completions", **body, stream=True))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    (calls,) = [delta["tool_calls"] for chunk in chunks if "tool_calls" in (delta := chunk["choices"][0]["delta"])]
    assert calls[0]["index"] == 0 and calls[0]["type"] == "function" and calls[0]["id"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "lima"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_image_is_seen(client):
    url = "data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "colors?"}]
    reply = client.chat.completions.create(model="", messages=[{"role": "user", "content": content}], seed=0)
    assert reply.choices[0].message.content == "yellow blue"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "http://127.0.0.1:1/x.png", "https://e.org/x"])
def test_an_image_comes_from_nowhere_else(server, url):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "colors?"}]
    reply = server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}])
    assert reply.status_code == 400 and "data: URL" in reply.json()["error"]["message"]


def test_a_stop_string_ends_the_reply(client):
    reply = client.chat.completions.create(model="", messages=user("reverse abcdef"), stop=["c"], seed=7)
    assert reply.choices[0].message.content == "fed"


def test_a_prediction_is_accounted_for(client):
    def ask(expected):
        prediction = {"type": "content", "content": expected}
        reply = client.chat.completions.create(model="", messages=user("reverse abcdef"), prediction=prediction, seed=7)
        details = reply.usage.completion_tokens_details
        return reply.choices[0].message.content, details.accepted_prediction_tokens, details.rejected_prediction_tokens

    assert ask("fedcba") == ("fedcba", 6, 0)
    assert ask("fedxba") == ("fedcba", 5, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "grammar"}),
        ("response_format", {"type": "json_schema"}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "get_weather"}}),
        ("tool_choice", {"type": "allowed_tools"}),
        ("n", 2),
        ("logprobs", True),
        ("diffusing", True),
        ("decoder", "other"),
        ("seed", "x"),
        ("prediction", {"type": "content", "content": 3}),
        ("messages", [{"role": "nobody", "content": "x"}]),
    ],
)
def test_what_cannot_be_honoured_is_named(server, field, value):
    reply = server.post("/v1/chat/completions", **{"messages": user("sort 21"), field: value})
    assert reply.status_code == 400
    assert field.rstrip("s") in reply.json()["error"]["message"].lower()


def test_a_prompt_beyond_the_context_is_refused_before_the_stream(server):
    reply = server.post("/v1/chat/completions", messages=user("abc " * 4000), stream=True)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["code"] == "context_length_exceeded"
    assert error["n_prompt_tokens"] > error["n_ctx"] == 4096


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative"])
def test_a_causal_decoder_takes_a_temperature(server, decoder):
    body = {"messages": user("reverse abc"), "temperature": 0, "seed": 0, "decoder": decoder, "max_tokens": 6}
    reply = server.post("/v1/chat/completions", **body).json()
    options = GenerationOptions(decoder=decoder, temperature=0, max_tokens=6, seed=0)
    own = generate(*server.engine.loaded[:2], "reverse abc", options=options)
    assert reply["choices"][0]["message"]["content"] == own.text


def test_the_diffusion_decoder_has_no_use_for_a_temperature(server):
    body = {"messages": user("reverse abc"), "temperature": 0.3, "top_p": 0.9, "seed": 0}
    assert server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"] == "cba"


def test_text_goes_on(client, server):
    reply = client.completions.create(model="", prompt="abc", max_tokens=5, seed=0, extra_body=FEW)
    Completion.model_validate(reply.model_dump(), strict=True)
    model, processor = server.engine.loaded[:2]
    options = GenerationOptions(max_tokens=5, seed=0, **FEW)
    assert reply.choices[0].text == generate(model, processor, processor.raw_prompt("abc"), options=options).text
    streamed = client.completions.create(model="", prompt="abc", max_tokens=5, seed=0, stream=True, extra_body=FEW)
    assert "".join(chunk.choices[0].text for chunk in streamed) == reply.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_written(server, stream):
    body = {"input": user("reverse abcdef"), "seed": 7, "stream": stream}
    reply = server.post("/v1/responses", **body)
    if not stream:
        whole = Response.model_validate(reply.json(), strict=True)
        assert whole.output_text == "fedcba" and whole.status == "completed"
        return
    events = [EVENT.validate_python(event, strict=True) for event in data_of(reply)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "fedcba"
    assert events[-1].type == "response.completed" and events[-1].response.output_text == "fedcba"


def test_a_response_calls_tools_and_goes_on(client):
    tools = [{"type": "function", **WEATHER, "strict": False}, {"type": "web_search"}]
    given = user("how is lima today?")
    with client.responses.stream(model="", input=given, tools=tools, extra_body={"seed": 0}) as events:
        first = events.get_final_response()
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "lima"}
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    given = [
        *given,
        {"type": "reasoning", "summary": []},
        call.model_dump(include={"type", "call_id", "name", "arguments"}),
        answer,
    ]
    second = client.responses.create(model="", input=given, tools=tools, extra_body={"seed": 0})
    assert second.output_text == "lima: rain"


class Person(BaseModel):
    name: Literal["ada", "bob"]
    age: int = Field(ge=0, le=99)


class Team(BaseModel):
    lead: Person
    others: list[Person] = Field(min_length=1, max_length=2)


def test_a_reply_is_valid_for_its_schema(client):
    for seed in range(2):
        given = {"model": "", "messages": user("json name=bob age=12"), "seed": seed, "max_tokens": 200}
        reply = client.chat.completions.parse(**given, response_format=Team, extra_body=FEW)
        assert isinstance(reply.choices[0].message.parsed, Team) and reply.choices[0].finish_reason == "stop"
    reply = client.responses.parse(model="", input=user("json name=bob age=12"), text_format=Person, extra_body=FEW)
    assert isinstance(reply.output_parsed, Person)


def test_a_json_object_is_one(server):
    body = {"messages": user("sort 21"), "response_format": {"type": "json_object"}, "seed": 0, "max_tokens": 20}
    (choice,) = server.post("/v1/chat/completions", **body, **FEW).json()["choices"]
    assert choice["message"]["content"].startswith("{")
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)


def test_a_keyword_that_cannot_be_honoured_is_named(server):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = server.post("/v1/chat/completions", messages=user("x"), response_format=form, stream=True)
    assert reply.status_code == 400 and "uniqueItems" in reply.json()["error"]["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_can_be_required(client, choice):
    tools = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    given = {"model": "", "messages": user("sort 21"), "tools": tools, "tool_choice": choice, "seed": 0}
    reply = client.chat.completions.create(**given, max_tokens=60, extra_body={**FEW, "temperature": 0})
    (call, *_) = reply.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and isinstance(json.loads(call.function.arguments)["city"], str)


def test_a_response_that_is_cut_is_incomplete(client):
    reply = client.responses.create(model="", input="count from 17", max_output_tokens=3)
    assert reply.status == "incomplete" and reply.incomplete_details.reason == "max_output_tokens"
    assert reply.usage.output_tokens == 3


@pytest.mark.parametrize(
    "more",
    [{"previous_response_id": "x"}, {"text": {"format": {"type": "json_schema"}}}, {"tool_choice": "required"}],
)
def test_a_response_says_what_it_cannot_do(server, more):
    reply = server.post("/v1/responses", input="sort 21", **more)
    assert reply.status_code == 400 and next(iter(more)) in reply.json()["error"]["message"]
