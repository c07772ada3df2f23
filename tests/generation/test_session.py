"""Conversations: each turn costs what it adds, and what goes wrong leaves the session as it was."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from mlx_diffusiongemma import (
    BusyError,
    ChatSession,
    GenerationOptions,
    PromptError,
    ToolCall,
    collect,
    generate,
    load,
)
from mlx_diffusiongemma.events import Commit, Done, Draft
from mlx_diffusiongemma.model.cache import Cache
from mlx_diffusiongemma.processing.images import PreparedImage

OPTIONS = GenerationOptions(seed=0, max_tokens=128, max_steps=8)


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


@pytest.fixture
def chat(demo):
    return ChatSession(*demo, options=OPTIONS)


def weather(city: str) -> str:
    """The weather.

    Args:
        city: Where.
    """
    return f"sunny in {city}"


def fresh(chat: ChatSession, messages, **given):
    """The reply to messages without a session."""
    return generate(chat.model, chat.processor, messages, options=OPTIONS, **given)


def test_a_conversation_equals_fresh_runs_and_encodes_only_what_it_adds(chat):
    for text in ("sort 53142", "reverse canvas", "json name=ada age=36", "count from 17"):
        history = chat.messages
        before = len(chat.processor.prompt(history).tokens) - 6 if history else 0
        result = chat.ask(text)
        expected = fresh(chat, [*history, {"role": "user", "content": text}])
        assert result.tokens == expected.tokens and result.stats.steps == expected.stats.steps
        if history:
            reply = len(chat.processor.tokenizer.encode(history[-1]["content"]))
            assert result.stats.cached_tokens >= before - reply - 12
        assert chat.messages[-1] == {"role": "assistant", "content": result.text}
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 4


def test_undo_and_reset(chat):
    chat.system = "be brief"
    first = chat.ask("sort 53142")
    expected = chat.ask("sort 97").tokens
    chat.undo()
    assert [message["content"] for message in chat.messages] == ["be brief", "sort 53142", first.text]
    again = chat.ask("sort 97")
    assert again.tokens == expected
    assert again.stats.cached_tokens == again.stats.prompt_tokens
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    with pytest.raises(PromptError, match="no turn to undo"):
        chat.undo()


def test_thoughts_stay_out_of_history(chat):
    chat.thinking = True
    result = chat.ask("sort 53142")
    assert result.thinking and chat.messages[-1]["reasoning"] == result.thinking
    history = chat.messages
    second = chat.ask("sort 97")
    expected = fresh(chat, [*history, {"role": "user", "content": "sort 97"}], thinking=True)
    assert second.tokens == expected.tokens
    assert second.stats.cached_tokens >= result.stats.prompt_tokens


def test_images_are_prepared_once_and_stay_in_the_conversation(chat):
    picture = Image.new("RGB", (96, 96), "red")
    chat.ask("colors?", images=[picture])
    image = chat.messages[0]["content"][0]["image"]
    assert isinstance(image, PreparedImage)
    history = chat.messages
    second = chat.ask("sort 97")
    assert second.stats.cached_tokens > image.soft_tokens
    assert second.tokens == fresh(chat, [*history, {"role": "user", "content": "sort 97"}]).tokens


def test_tool_calls_come_back_with_their_results(demo):
    chat = ChatSession(*demo, tools=[weather], options=OPTIONS)
    chat._turns = (asking(), {"role": "assistant", "content": "", "tool_calls": [call("weather", city="oslo")]})
    assert chat.tool_calls == [ToolCall("weather", {"city": "oslo"})] and chat.tool_calls[0].id == "call_1"
    with pytest.raises(PromptError, match="send_tool_results"):
        chat.send("never mind")
    with pytest.raises(PromptError, match="called 1 tools; 2 results"):
        chat.send_tool_results(["sunny", "rainy"])
    with pytest.raises(PromptError, match="cannot be written as JSON"):
        chat.send_tool_results([[object()]])
    history = chat.messages
    result = collect(chat.send_tool_results([weather("oslo")]))
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "sunny in oslo"}
    assert result.tokens == fresh(chat, [*history, answer], tools=[weather]).tokens
    assert chat.messages[2] == answer and chat.messages[3]["role"] == "assistant"
    chat.undo()
    assert chat.messages == []
    with pytest.raises(PromptError, match="called 0 tools"):
        chat.send_tool_results(["sunny"])


def asking() -> dict:
    return {"role": "user", "content": "weather in oslo"}


def call(name: str, **arguments: str) -> dict:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_calls_of_the_model_become_part_of_the_conversation(demo, questions):
    """A question of the trained tasks."""
    model, processor = demo
    question = next(each for each in questions if each["task"] == "tool call")
    chat = ChatSession(model, processor, tools=question["tools"], options=OPTIONS)
    if question["messages"][0]["role"] == "system":
        chat.system = question["messages"][0]["content"]
    result = chat.ask(question["messages"][-1]["content"])
    assert result.finish_reason == "tool"
    assert chat.tool_calls == [ToolCall(made["name"], made["arguments"]) for made in question["tool_calls"]]
    assert [call.id for call in result.tool_calls] == [call.id for call in chat.tool_calls] == ["call_1"]


def replying(*parts: tuple[str, str]):
    """A reply parser that reads every reply as these parts."""
    nothing = SimpleNamespace(feed=lambda tokens: [], preview=lambda tokens: [[] for _ in tokens] or [[]])
    return lambda prompt=None: SimpleNamespace(**vars(nothing), finish=lambda: list(parts))


def test_calls_are_counted_over_the_conversation(demo, monkeypatch, tmp_path):
    chat = ChatSession(*demo, tools=[weather], options=OPTIONS)
    written = [("tool_call", 'call:weather{city:"lima"}'), ("tool_call", 'call:weather{city:"oslo"}call:weather{}')]
    calls = [ToolCall("weather", arguments) for arguments in ({"city": "lima"}, {"city": "oslo"}, {})]
    for first in (1, 4):
        monkeypatch.setattr(chat.processor, "reply_parser", replying(*written))
        ids = [f"call_{number}" for number in range(first, first + 3)]
        for again in (True, False):
            result = chat.ask("?")
            assert result.tool_calls == chat.tool_calls == calls and result.finish_reason == "tool"
            assert [call.id for call in result.tool_calls] == [call.id for call in chat.tool_calls] == ids
            if again:
                chat.undo()
        monkeypatch.setattr(chat.processor, "reply_parser", replying(("text", "done")))
        assert collect(chat.send_tool_results(["a", "b", "c"])).text == "done" and chat.tool_calls == []
        assert [message["tool_call_id"] for message in chat.messages[-4:-1]] == ids
    chat.save(tmp_path / "chat")
    chat.restore(tmp_path / "chat")
    monkeypatch.setattr(chat.processor, "reply_parser", replying(*written))
    assert [call.id for call in chat.ask("?").tool_calls] == ["call_7", "call_8", "call_9"]


def test_calls_are_counted_on_from_the_messages(demo, monkeypatch):
    asked = {"role": "user", "content": "?"}
    called = {"role": "assistant", "tool_calls": [ToolCall("weather", {"city": "oslo"})]}
    monkeypatch.setattr(demo[1], "reply_parser", replying(("tool_call", "call:weather{}")))
    result = generate(*demo, [asked, called, {"role": "tool", "content": "sunny"}, asked], options=OPTIONS)
    assert [call.id for call in result.tool_calls] == ["call_2"]


@pytest.fixture(scope="module")
def questions(pytestconfig):
    path = pytestconfig.rootpath / "tests" / "data" / "tiny" / "prompts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


BAD = {
    "an unreadable image": ("colors?", [b"not an image"]),
    "a missing image": ("colors?", ["/nowhere/picture.png"]),
    "an empty image": ("colors?", [Image.new("RGB", (0, 4))]),
    "a prompt that does not fit": ("a" * 5000, []),
    "no text": (None, []),
    "invalid Unicode": ("\ud800", []),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_leaves_the_session_as_it_was(chat, bad):
    chat.ask("sort 53142")
    before = chat.messages
    text, images = BAD[bad]
    with pytest.raises(PromptError) as caught:
        chat.send(text, images)
    assert "\n" not in str(caught.value)
    chat.tools = [{"name": "broken", "parameters": 3}]
    with pytest.raises(PromptError, match="broken"):
        chat.send("sort 97")
    chat.tools = ()
    assert chat.messages == before
    assert chat.ask("sort 97").finish_reason == "stop"


@pytest.mark.parametrize("way", ["cancel", "close", "fail"])
def test_a_turn_that_does_not_end_leaves_the_session_as_it_was(chat, way, monkeypatch):
    chat.ask("sort 53142")
    before = chat.messages
    cancel = threading.Event()
    events = chat.send("solve 42.3/3.24/1.../2.31", cancel=cancel)
    if way == "fail":
        monkeypatch.setattr(chat.model, "denoise", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(events)
        monkeypatch.undo()
    else:
        next(event for event in events if isinstance(event, Draft))
        assert not issubclass(BusyError, PromptError)
        with pytest.raises(BusyError, match="busy"):
            chat.send("sort 97")
        with pytest.raises(BusyError, match="busy"):
            chat.undo()
        if way == "cancel":
            cancel.set()
            *_, done = events
            assert done.finish_reason == "cancelled"
        else:
            events.close()
    assert chat.messages == before
    again = chat.ask("sort 97")
    assert again.finish_reason == "stop" and again.stats.cached_tokens > 0


def test_a_turn_whose_encoding_fails_is_read_again(chat, monkeypatch, tmp_path):
    chat.ask("sort 53142")
    before = chat.messages
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "evaluate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            chat.ask("sort 97")
    assert chat.messages == before
    chat.save(tmp_path / "chat")
    expected = fresh(chat, [*before, {"role": "user", "content": "sort 97"}])
    again = chat.ask("sort 97")
    assert again.tokens == expected.tokens and again.stats.cached_tokens == 0
    chat.restore(tmp_path / "chat")
    assert chat.ask("sort 97").tokens == expected.tokens


def fail(*_: object) -> None:
    raise RuntimeError("out of memory")


def test_a_turn_is_over_when_done_is_seen(chat):
    """A caller need not go on after the last event."""
    events = chat.send("sort 53142")
    next(event for event in events if isinstance(event, Done))
    assert chat.messages[-1]["content"] == "12345"


def restore_what_it_was(chat, path):
    chat.save(path)
    chat.restore(path)


def undo_and_say_again(chat, path):
    [question] = [message["content"] for message in chat.messages if message["role"] == "user"]
    chat.undo()
    chat.ask(question)


CHANGES = {
    "another turn": lambda chat, path: chat.ask("sort 97"),
    "reset": lambda chat, path: chat.reset(),
    "restore": restore_what_it_was,
    "undo": lambda chat, path: chat.undo(),
    "undo, and say again": undo_and_say_again,
}


@pytest.mark.parametrize(
    ("change", "turns"), [(change, turns) for change in CHANGES for turns in (0, 1) if turns or "undo" not in change]
)
def test_a_reply_asked_for_in_an_earlier_conversation_is_refused(chat, change, turns, tmp_path):
    """Even where nothing is to be seen of the change."""
    for _ in range(turns):
        chat.ask("count from 17")
    early = [chat.send("sort 53142") for _ in range(2)]
    CHANGES[change](chat, tmp_path / "chat")
    history, held = chat.messages, chat._cache.offset
    for events in early:
        with pytest.raises(PromptError, match="send it again"):
            next(events)
        assert list(events) == []
    assert chat.messages == history and chat._cache.offset == held
    asked = {"role": "user", "content": "sort 53142"}
    assert chat.ask("sort 53142").tokens == fresh(chat, [*history, asked]).tokens


def test_a_reply_is_not_refused_where_nothing_has_changed(chat, tmp_path):
    early = chat.send("sort 53142")
    with pytest.raises(PromptError, match="no turn to undo"):
        chat.undo()
    with pytest.raises(PromptError, match="no file"):
        chat.restore(tmp_path / "missing")
    with pytest.raises(PromptError):
        chat.send(None)
    chat.save(tmp_path / "chat")
    other = chat.send("sort 97")
    next(event for event in other if isinstance(event, Draft))
    with pytest.raises(BusyError, match="busy"):
        next(early)
    other.close()
    early = chat.send("sort 53142")
    assert collect(early).text == "12345" and len(chat.messages) == 2


def test_nobody_else_holds_a_part_of_the_conversation(demo, monkeypatch):
    chat = ChatSession(*demo, "be brief", [weather], options=OPTIONS)
    call = ("tool_call", 'call:weather{city:"lima",days:[1,{x:2}]}')
    monkeypatch.setattr(chat.processor, "reply_parser", replying(("thinking", "hm"), call))
    events = []
    for event in chat.send("?", [Image.new("RGB", (96, 96), "red")]):
        if isinstance(event, Commit):
            spoil([event.parts, event.tokens, event.tool_calls, *(made.arguments for made in event.tool_calls)])
        events.append(event)
    before = chat.messages
    function = {"name": "weather", "arguments": {"city": "lima", "days": [1, {"x": 2}]}}
    assert before[2]["tool_calls"] == [{"id": "call_1", "type": "function", "function": function}]
    given = {"sky": ["sun", {"t": 21}]}
    chat.send_tool_results([given])  # a reply that nobody reads
    results = chat.send_tool_results([given])
    spoil([given, *(made.arguments for made in chat.tool_calls), chat.messages])
    collect(results)
    assert chat.messages[:3] == before and chat.messages[3]["content"] == {"sky": ["sun", {"t": 21}]}
    for message in chat.messages:
        spoil([message])
    assert chat.messages[:3] == before and chat.messages[1]["content"][0]["image"] is before[1]["content"][0]["image"]


def spoil(values):
    """Empty every list and mapping in `values`, however deep."""
    for value in values:
        if isinstance(value, list | dict):
            spoil(list(value.values() if isinstance(value, dict) else value))
            value.clear()


def test_a_tools_result_is_not_too_deep(demo):
    chat = ChatSession(*demo, tools=[weather], options=OPTIONS)
    chat._turns = (asking(), {"role": "assistant", "content": "", "tool_calls": [call("weather", city="oslo")]})
    deep = nested(64)
    for refused in (nested(65), nested(900), {"x": deep}, {1: [deep]}):
        with pytest.raises(PromptError, match=r"levels deep|as JSON"):
            chat.send_tool_results([refused])
    deep["circle"] = deep
    with pytest.raises(PromptError, match="as JSON"):
        chat.send_tool_results([deep])
    collect(chat.send_tool_results([nested(64)]))
    assert chat.messages[2]["content"] == nested(64)


def nested(levels):
    return {"x": nested(levels - 1)} if levels else 1


def test_a_session_crosses_threads(chat):
    results = []
    for text in ("sort 53142", "sort 97"):
        thread = threading.Thread(target=lambda asked=text: results.append(chat.ask(asked).text))
        thread.start()
        thread.join()
    assert results[0] == "12345" and results[1]


@pytest.mark.parametrize("results", [None, 5, "text"])
def test_results_that_are_no_list(chat, results):
    with pytest.raises(PromptError, match="are a list"):
        chat.send_tool_results(results)
