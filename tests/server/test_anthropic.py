"""Anthropic's messages, asked by the official client, every event checked strictly against its types."""

import json

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from servers import data_of, user

from mlx_diffusiongemma.server import answering

TOOL = {
    "name": "get_weather",
    "description": "Get weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
EVENT = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)


def test_a_message_is_answered(client):
    reply = client.messages.create(
        model="claude", max_tokens=50, messages=user("reverse abcdef"), extra_body={"seed": 7}
    )
    Message.model_validate(reply.model_dump(), strict=True)
    assert [block.text for block in reply.content] == ["fedcba"] and reply.stop_reason == "end_turn"
    assert reply.usage.output_tokens > 0


def test_every_event_of_a_stream_is_one_of_the_clients(server, client):
    body = {"messages": user("count from 17"), "max_tokens": 100, "seed": 1}
    events = data_of(server.post("/v1/messages?beta=true", **body, stream=True))
    checked = [EVENT.validate_python(event, strict=True) for event in events]
    assert [event.type for event in checked[:2]] == ["message_start", "content_block_start"]
    assert [event.type for event in checked[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    with client.messages.stream(
        model="", max_tokens=100, messages=user("count from 17"), extra_body={"seed": 1}
    ) as stream:
        text = "".join(stream.text_stream)
        whole = stream.get_final_message()
    assert text == whole.content[0].text == server.post("/v1/messages", **body).json()["content"][0]["text"]


def test_a_tool_is_called_and_its_answer_read(client):
    asked = user("how is lima today?")
    given = {"model": "", "max_tokens": 60, "tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]}
    with client.messages.stream(messages=asked, extra_body={"seed": 0}, **given) as stream:
        first = stream.get_final_message()
    (call,) = first.content
    assert (call.type, call.name, call.input, first.stop_reason) == (
        "tool_use",
        "get_weather",
        {"city": "lima"},
        "tool_use",
    )
    answer = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    turns = [
        *asked,
        {"role": "assistant", "content": [call.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [answer]},
    ]
    second = client.messages.create(messages=turns, extra_body={"seed": 0}, **given)
    assert second.content[0].text == "lima: rain"


def test_the_next_turn_reads_only_what_is_new_although_a_header_changes(server):
    def ask(number, messages):
        header = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={number};"}
        rules = {"type": "text", "text": "Be brief. " * 20, "cache_control": {"type": "ephemeral"}}
        return server.post("/v1/messages", system=[header, rules], messages=messages, max_tokens=40, seed=0).json()

    first = ask(1, user("reverse abc"))
    said = {"role": "assistant", "content": first["content"]}
    second = ask(2, [*user("reverse abc"), said, *user("sort 21")])
    read = first["usage"]["input_tokens"] + first["usage"]["cache_read_input_tokens"]
    assert read > 100 and second["usage"]["cache_read_input_tokens"] >= read - 1
    assert second["usage"]["input_tokens"] < 30


def test_tokens_are_counted(client, server):
    counted = client.messages.count_tokens(model="", messages=user("reverse abc")).input_tokens
    reply = server.post("/v1/messages", messages=user("reverse abc"), max_tokens=4).json()
    assert counted == reply["usage"]["input_tokens"] + reply["usage"]["cache_read_input_tokens"]
    assert reply["stop_reason"] in ("end_turn", "max_tokens")


def test_system_messages_may_stand_in_the_conversation(server):
    messages = [{"role": "system", "content": "Be brief."}, *user("reverse abc")]
    assert server.post("/v1/messages", messages=messages, max_tokens=20).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", {"type": "any"}),
        ("tool_choice", {"type": "tool", "name": "get_weather"}),
        ("output_config", {"format": {"type": "json_schema"}}),
        ("tool_choice", {"type": "other"}),
        ("max_tokens", 0),
        ("messages", [{"role": "assistant", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "document"}]}]),
    ],
)
def test_what_cannot_be_honoured_is_an_error_of_the_clients(client, field, value):
    given = {"max_tokens": 20, "messages": user("sort 21"), field: value}
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="", **given)
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "invalid_request_error"


def test_a_reply_has_the_form_that_is_asked_for(client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    given = {"model": "", "max_tokens": 60, "messages": user("json name=bob age=12")}
    form = {"format": {"type": "json_schema", "schema": schema}}
    reply = client.messages.create(**given, extra_body={"output_config": form, "seed": 0})
    assert json.loads(reply.content[0].text).keys() == {"ok"}
    choice = {"type": "tool", "name": "get_weather"}
    reply = client.messages.create(**given, tools=[TOOL], tool_choice=choice, extra_body={"seed": 0})
    assert reply.content[0].name == "get_weather" and isinstance(reply.content[0].input["city"], str)


def test_silence_is_filled_with_pings(server, monkeypatch):
    monkeypatch.setattr(answering, "PING_SECONDS", 0.005)
    reply = server.post("/v1/messages", messages=user("count from 17"), max_tokens=50, stream=True)
    assert 'event: ping\ndata: {"type":"ping"}\n\n' in reply.text
    reply = server.post("/v1/chat/completions", messages=user("count from 18"), stream=True)
    assert "\n\n: ping\n\n" in reply.text


def test_the_sequence_that_stopped_it_is_named(client, server):
    given = {"model": "", "max_tokens": 40, "messages": user("reverse abcdef"), "stop_sequences": ["x", "ba", "cb"]}
    reply = client.messages.create(**given, extra_body={"seed": 7})
    assert (reply.content[0].text, reply.stop_reason, reply.stop_sequence) == ("fed", "stop_sequence", "cb")
    *_, delta, _ = data_of(server.post("/v1/messages", **given, seed=7, stream=True))
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "cb"}
    reply = client.messages.create(**{**given, "stop_sequences": ["x"]}, extra_body={"seed": 7})
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
