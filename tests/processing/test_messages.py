"""Tool calls in messages: ids of their own, and the answer to each beside it, whatever callers write."""

from __future__ import annotations

from typing import Any

import pytest
from templates import demo_processor

from mlx_diffusiongemma import PromptError, ToolCall
from mlx_diffusiongemma.processing.messages import call_ids, normalize_messages
from mlx_diffusiongemma.processing.tools import free_number, number_calls


def calling(*calls: tuple[str, str | None]) -> dict[str, Any]:
    """The assistant's message that calls functions by name, with these ids."""
    made = [{"function": {"name": name}} | ({"id": given} if given is not None else {}) for name, given in calls]
    return {"role": "assistant", "tool_calls": made}


def answer(given: str | None = None, name: str | None = None) -> dict[str, Any]:
    named = {"tool_call_id": given, "name": name}
    return {"role": "tool", "content": "ok"} | {key: value for key, value in named.items() if value is not None}


# name: (messages, ids of the calls, ids of the answers)
CONVERSATIONS = {
    "ids": ([calling(("f", "a"), ("g", "b")), answer("b"), answer("a")], ["a", "b"], ["b", "a"]),
    "no ids": ([calling(("f", None), ("g", "")), answer(), answer()], ["call_1", "call_2"], ["call_1", "call_2"]),
    "by name": (
        [calling(("f", None), ("g", None)), answer(name="g"), answer(name="f")],
        ["call_1", "call_2"],
        ["call_2", "call_1"],
    ),
    "a name that none has": ([calling(("f", None), ("g", None)), answer(name="h")], ["call_1", "call_2"], ["call_1"]),
    "counted over the conversation": (
        [calling(("f", None)), answer(), calling(("f", None), ("f", None)), answer(), answer()],
        ["call_1", "call_2", "call_3"],
        ["call_1", "call_2", "call_3"],
    ),
    "the ids we give, and left out in the call": (
        [calling(("f", None), ("f", None)), answer("call_2"), answer("call_1")],
        ["call_1", "call_2"],
        ["call_2", "call_1"],
    ),
    "an id that one call has, another would get": (
        [calling(("f", None), ("g", "call_1")), answer("call_1"), answer()],
        ["call_2", "call_1"],
        ["call_1", "call_2"],
    ),
    "an id that a later call has": (
        [calling(("f", None)), answer(), calling(("g", "call_1")), answer("call_1")],
        ["call_2", "call_1"],
        ["call_2", "call_1"],
    ),
    "the same id in every turn": (
        [calling(("f", "call_1")), answer("call_1"), calling(("g", "call_1")), answer("call_1")],
        ["call_1", "call_2"],
        ["call_1", "call_2"],
    ),
    "the same id twice in a turn": (
        [calling(("f", "a"), ("g", "a"), ("h", "b")), answer("b"), answer("a"), answer("a")],
        ["a", "call_1", "b"],
        ["b", "a", "call_1"],
    ),
    "the same id twice, told apart by name": (
        [calling(("f", "a"), ("g", "a")), answer("a", "g"), answer("a", "f")],
        ["a", "call_1"],
        ["call_1", "a"],
    ),
    "an id of its own in the answer only": (
        [calling(("f", "a"), ("g", None)), answer("x"), answer("a")],
        ["a", "call_1"],
        ["call_1", "a"],
    ),
    "an answer without an id": ([calling(("f", "a"), ("g", "b")), answer(), answer("b")], ["a", "b"], ["a", "b"]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_call_has_an_id_of_its_own_and_its_answer_names_it(name):
    messages, of_calls, of_answers = CONVERSATIONS[name]
    normal, _ = normalize_messages(messages)
    assert call_ids(normal) == of_calls
    assert [message["tool_call_id"] for message in normal if message["role"] == "tool"] == of_answers


@pytest.mark.parametrize(
    "messages",
    [
        [calling(("f", "a")), answer("b")],
        [calling(("f", "a"), ("g", "b")), answer("a"), answer("a")],
        [calling(("f", "a")), answer("a"), calling(("g", "b")), answer("a")],
        [calling(("f", "a"), ("g", "a")), answer("call_7")],
    ],
)
def test_an_answer_to_another_call_is_refused(messages):
    with pytest.raises(PromptError, match="waits for no answer"):
        normalize_messages(messages)


def test_answers_are_shown_under_the_function_they_answer():
    """The template finds a function's name by the answer's id."""
    call = {"role": "assistant", "tool_calls": [ToolCall("f", {}, "a"), ToolCall("g", {}, "a")]}
    later = {"role": "assistant", "tool_calls": [ToolCall("h", {}, "a")]}
    answers = [{"role": "tool", "tool_call_id": "a", "content": text} for text in ("of f", "of g", "of h")]
    shown = demo_processor().prompt([call, *answers[:2], later, answers[2]]).text
    for name in "fgh":
        assert f'response:{name}{{value:<|"|>of {name}<|"|>}}' in shown


def test_a_reply_counts_on_from_the_prompts_calls():
    processor = demo_processor()
    asked = {"role": "user", "content": "?"}
    assert processor.prompt("?").first_call == processor.prompt([2, 3]).first_call == 1
    for messages, first in (
        ([asked, calling(("f", None)), answer()], 2),
        ([asked, calling(("f", "call_7"), ("f", "call_2"))], 8),
        ([asked, calling(("f", "toolu_3"), ("f", "call_x"), ("f", "call_" + "9" * 5000), ("f", "call_٣"))], 1),
    ):
        assert processor.prompt(messages).first_call == first
    prompt = processor.prompt([asked, calling(("f", "call_3"))])
    written = (
        "<|tool_call>call:f{}call:g{}<tool_call|><|tool_call>call:broken<tool_call|><|tool_call>call:f{}<tool_call|>"
    )
    tokens = processor.tokenizer.encode(written, add_special_tokens=False)
    assert [call.id for call in processor.parse(tokens, prompt).tool_calls] == ["call_4", "call_5", "call_6"]
    assert [call.id for call in processor.parse(tokens).tool_calls] == ["call_1", "call_2", "call_3"]


def test_ids_are_no_part_of_what_a_call_is():
    assert ToolCall("f", {"x": 1}) == ToolCall("f", {"x": 1}, "call_1") != ToolCall("f", {"x": 2}, "call_1")
    calls = number_calls([ToolCall("f", {}), ToolCall("f", {})], 3)
    assert [call.id for call in calls] == ["call_3", "call_4"]
    assert free_number(call.id for call in calls) == 5 and free_number([]) == 1
