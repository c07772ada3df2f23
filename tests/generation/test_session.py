"""Conversations: each turn costs what it adds, and what goes wrong leaves the session as it was."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest
from PIL import Image

from mlx_diffusiongemma import (
    BusyError,
    ChatSession,
    CheckpointError,
    GenerationOptions,
    PromptError,
    ToolCall,
    collect,
    generate,
    load,
)
from mlx_diffusiongemma.checkpoints.safetensors import write_header
from mlx_diffusiongemma.checkpoints.session_file import read_session, write_session
from mlx_diffusiongemma.events import Done, Draft
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
    question = {"role": "user", "content": "weather in oslo"}
    chat = ChatSession(*demo, tools=[weather], options=OPTIONS)
    chat._turns = (question, {"role": "assistant", "content": "", "tool_calls": [call("weather", city="oslo")]})
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


def test_a_file_in_which_ids_repeat_gets_ids_of_their_own(demo, chat, tmp_path):
    """As sessions numbered the calls of every turn before."""
    asked, sunny = {"role": "user", "content": "?"}, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    called = {"role": "assistant", "content": "", "tool_calls": [call("weather", city="oslo")]}
    messages = [asked, called, sunny, {"role": "assistant", "content": "Sun."}, asked, called]
    conversation = {"system": None, "thinking": False, "messages": messages}
    write_session(tmp_path / "chat", demo[0], conversation, demo[0].make_cache())
    chat.restore(tmp_path / "chat")
    assert [call.id for call in chat.tool_calls] == ["call_2"]
    assert chat.messages[1] == called and chat.messages[2] == sunny and chat.messages[:1] == [asked]
    chat.tools = [weather]
    collect(chat.send_tool_results(["rain"]))
    assert chat.messages[6] == {"role": "tool", "tool_call_id": "call_2", "content": "rain"}


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


def test_a_reply_asked_for_before_another_is_refused(chat):
    early = chat.send("sort 53142")
    chat.ask("sort 97")
    with pytest.raises(PromptError, match="send it again"):
        next(early)
    assert len(chat.messages) == 2


def test_a_session_crosses_threads(chat):
    results = []
    for text in ("sort 53142", "sort 97"):
        thread = threading.Thread(target=lambda asked=text: results.append(chat.ask(asked).text))
        thread.start()
        thread.join()
    assert results[0] == "12345" and results[1]


CONTINUE = """
import json, sys
from mlx_diffusiongemma import ChatSession, GenerationOptions, load
chat = ChatSession(*load(sys.argv[1]), options=GenerationOptions(seed=0, max_tokens=128, max_steps=8))
chat.restore(sys.argv[2])
result = chat.ask("reverse canvas")
print(json.dumps([result.tokens, result.stats.cached_tokens, chat.system, chat.thinking, len(chat.messages)]))
"""


def test_a_saved_session_goes_on_in_another_process(chat, demo_float32, tmp_path):
    chat.system = "be brief"
    chat.ask("colors?", images=[Image.new("RGB", (96, 96), "red")])
    chat.ask("count from 17")
    path = tmp_path / "a chat.session"
    chat.save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["a chat.session"]
    read = chat._cache.snapshots[-1].offset
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(demo_float32), str(path)], capture_output=True, text=True, check=True
    )
    expected = chat.ask("reverse canvas")
    tokens, cached, system, thinking, count = json.loads(done.stdout)
    assert tokens == expected.tokens and cached == read
    assert (system, thinking, count) == ("be brief", False, 7)


def test_a_restored_session_is_the_saved_one(chat, demo, tmp_path):
    chat.ask("colors?", images=[Image.new("RGB", (96, 96), "red")])
    chat.save(tmp_path / "chat")
    other = ChatSession(*demo, system="other", thinking=True, options=OPTIONS)
    other.ask("sort 97")
    other.restore(tmp_path / "chat")
    assert other.system is None and other.thinking is False
    mine, theirs = chat.messages[0]["content"][0]["image"], other.messages[0]["content"][0]["image"]
    assert (mine.pixels == theirs.pixels).all() and (mine.positions == theirs.positions).all()
    assert (mine.digest, mine.soft_tokens) == (theirs.digest, theirs.soft_tokens)
    one, two = chat.ask("sort 53142"), other.ask("sort 53142")
    assert one.tokens == two.tokens
    empty = ChatSession(*demo, options=OPTIONS)
    empty.save(tmp_path / "empty")
    other.restore(tmp_path / "empty")
    assert other.messages == [] and other.ask("sort 97").finish_reason == "stop"


@pytest.fixture(scope="module")
def saved(demo, tmp_path_factory):
    chat = ChatSession(*demo, options=OPTIONS)
    chat.ask("sort 53142")
    path = tmp_path_factory.mktemp("sessions") / "chat"
    chat.save(path)
    return path


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "nothing": lambda content: b"",
    "cut short": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2],
    "cut in its header": lambda content: content[:100],
    "longer": lambda content: content + b"x",
    "another number": lambda content: flipped(content, len(content) - 9),
    "another message": lambda content: content.replace(b"53142", b"53143", 1),
    "text": lambda content: b"Dear diary, this is not a session at all.",
    "other tensors": lambda content: write_header([("weight", "F32", (2,))]) + bytes(8),
    "an enormous header": lambda content: b"\xff" * 8 + content[8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(chat, saved, tmp_path, damage):
    chat.ask("sort 97")
    before = chat.messages
    path = tmp_path / "damaged"
    path.write_bytes(DAMAGE[damage](saved.read_bytes()))
    with pytest.raises(CheckpointError, match="session") as caught:
        chat.restore(path)
    assert "\n" not in str(caught.value)
    assert chat.messages == before
    assert chat.ask("sort 53142").finish_reason == "stop"


def test_no_single_flipped_byte_goes_unnoticed(chat, saved, tmp_path):
    content = saved.read_bytes()
    path = tmp_path / "flipped"
    for place in range(0, len(content), len(content) // 60):
        path.write_bytes(flipped(content, place))
        with pytest.raises(CheckpointError):
            chat.restore(path)


def test_a_file_of_another_model_or_version_is_refused(chat, saved, demo_float32, demo_4bit, tmp_path):
    other = ChatSession(*load(demo_4bit))
    with pytest.raises(CheckpointError, match="saved with another model"):
        other.restore(saved)
    tuned, processor = load(demo_float32)
    projection = tuned.model.decoder.layers[2].mlp.down_proj
    projection.weight = projection.weight * 1.001
    with pytest.raises(CheckpointError, match="saved with another model"):
        ChatSession(tuned, processor).restore(saved)
    arrays, metadata = mx.load(str(saved), format="safetensors", return_metadata=True)
    mx.save_safetensors(str(tmp_path / "old.safetensors"), arrays, metadata | {"version": "0"})
    with pytest.raises(CheckpointError, match="saved in version 0"):
        chat.restore(tmp_path / "old.safetensors")
    with pytest.raises(PromptError, match="There is no file"):
        chat.restore(tmp_path / "missing")


def test_what_cannot_be_saved_is_one_sentence(chat, tmp_path):
    chat.ask("sort 97")
    with pytest.raises(PromptError, match="cannot be saved to"):
        chat.save(tmp_path / "missing" / "chat")
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(PromptError, match="cannot be saved to"):
        chat.save(taken)
    assert list(tmp_path.iterdir()) == [taken]
    assert chat.ask("sort 53142").finish_reason == "stop"


@pytest.mark.parametrize("path", ["file/x", "x" * 300, "a\0b", "", None, 5])
def test_paths_that_cannot_be_are_one_sentence(chat, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    chat.ask("sort 53142")
    for act in (chat.save, chat.restore):
        with pytest.raises(PromptError) as caught:
            act(path)
        assert "\n" not in str(caught.value)
    assert len(chat.messages) == 2 and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("left", [0, 1])
def test_what_was_undone_is_not_saved(chat, demo, tmp_path, left):
    for question in ["sort 53142"] * left + ["reverse qwxyz"]:
        chat.ask(question)
    chat.undo()
    chat.save(tmp_path / "undone")
    kept = read_session(tmp_path / "undone", demo[0])[1].labels
    assert "qwxyz" not in demo[1].tokenizer.decode([label for label in kept if isinstance(label, int)])
    assert bool(kept) == bool(left)


@pytest.mark.parametrize("results", [None, 5, "text"])
def test_results_that_are_no_list(chat, results):
    with pytest.raises(PromptError, match="are a list"):
        chat.send_tool_results(results)
