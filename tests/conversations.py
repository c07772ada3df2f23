"""Conversations that chat templates must render, one of each kind that users and agents have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlx_diffusiongemma import ToolCall


@dataclass(frozen=True)
class Conversation:
    """`messages` and `tools` as a caller writes them.

    plain, plain_tools: the same in the one form that every template reads; None where there is no difference.
    ours_differs: why our template does not render it as the hub's current one; empty where it does.
    """

    name: str
    messages: list[Any]
    tools: tuple[Any, ...] = ()
    thinking: bool = False
    plain: list[Any] | None = None
    plain_tools: list[Any] | None = None
    ours_differs: str = ""


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def call(name: str, arguments: Any, identity: str | None = None) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if identity is None else {"id": identity, **made}


def function(name: str, description: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    body = {"name": name, "description": description, **more}
    return {"type": "function", "function": body if parameters is None else {**body, "parameters": parameters}}


def parameters(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def forecast(city: str, days: int = 1, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
    """Tell the weather of the coming days.

    Args:
        city: Where
        days: How many days
        unit: Of temperatures
    """
    return f"{city} {days} {unit}"


IMAGE = {"type": "image"}
WEATHER = function("get_weather", "Get weather", parameters(["city"], city={"type": "string", "description": "City"}))
SEARCH = function(
    "search-files",
    "Search",
    parameters(
        ["query", "limit"],
        query={"type": "string", "description": "What to look for"},
        kind={"type": "string", "enum": ["code", "text"], "description": "Of file"},
        limit={"type": "integer", "description": "Most results"},
        ratio={"type": "number"},
        hidden={"type": "boolean", "nullable": True},
    ),
)
NESTED = function(
    "plan",
    "Make a plan",
    parameters(
        ["steps"],
        steps={
            "type": "array",
            "description": "In order",
            "items": {
                "type": "object",
                "description": "One step",
                "properties": {"title": {"type": "string"}, "hours": {"type": "number", "description": "Of work"}},
                "required": ["title"],
            },
        },
        tags={"type": "array", "items": {"type": "string"}},
        owner={
            "type": "object",
            "description": "Who",
            "properties": {"name": {"type": "string"}, "team": {"type": "string", "nullable": True}},
            "required": ["name"],
        },
    ),
)
CLOCK = function("now", "The time")
FORECAST = function(
    "forecast",
    "Tell the weather of the coming days.",
    parameters(
        ["city"],
        city={"type": "string", "description": "Where"},
        days={"type": "integer", "description": "How many days"},
        unit={"type": "string", "enum": ["celsius", "fahrenheit"], "description": "Of temperatures"},
    ),
)
RAIN = call("get_weather", {"city": "lima"}, "1")
AWKWARD = {
    "text": 'say "hi" {now}, [ok]\nand a\\b',
    "empty": "",
    "list": [1, 2.5, "x", [True, False]],
    "object": {"b": {"c": "d"}, "a": -1},
    "on": True,
    "zero": 0,
    "max-tokens": 7,
}
TWO_TURNS = "the hub's current one opens the model's turn again after a tool's answer"
THOUGHT = "<|channel>thought\nIt is a question.\n<channel|>"

PLAIN = [
    Conversation("one turn", [user("hi")]),
    Conversation("empty", [user("")]),
    Conversation("white space around", [user("  hi \n\n")]),
    Conversation("lines", [user("one\n\n  two\n\tthree")]),
    Conversation("other scripts", [user("naïve 日本語 😀 العربية")]),
    Conversation("code", [user("def f(x):\n    return {'a': [1, 2]}  # {{ x }} {% if %}")]),
    Conversation("angle brackets", [user("a < b | c > d <b>bold</b> &amp;")]),
    Conversation("three turns", [user("hi"), assistant("hello"), user("bye")]),
    Conversation("five turns", [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]),
    Conversation("two user turns", [user("a"), user("b")]),
    Conversation("an answered prompt", [user("a"), assistant("b")]),
    Conversation("two answers", [user("a"), assistant("b"), assistant("c"), user("d")]),
    Conversation("an empty answer", [user("a"), assistant(""), user("b")]),
    Conversation("white space around an answer", [user("a"), assistant("\n b \n"), user("c")]),
    Conversation("begins with the model", [assistant("Welcome."), user("hi")]),
    Conversation(
        "model for assistant",
        [user("a"), {"role": "model", "content": "b"}, user("c")],
        plain=[user("a"), assistant("b"), user("c")],
    ),
    Conversation(
        "no content",
        [user("a"), {"role": "assistant", "content": None}, user("b")],
        plain=[user("a"), assistant(""), user("b")],
    ),
]
SYSTEM = [
    Conversation("system", [system("Be brief."), user("hi")]),
    Conversation("developer", [system("Be brief.", "developer"), user("hi")]),
    Conversation("system, white space around", [system("\n Be brief.\n"), user("hi")]),
    Conversation("an empty system", [system(""), user("hi")]),
    Conversation("system in lines", [system("Be brief.\n\n- one\n- two"), user("hi"), assistant("yes"), user("ok")]),
    Conversation(
        "system in parts",
        [system([text("Be brief."), text("Be kind.")]), user("hi")],
        ours_differs="the hub's puts a space after every part, the last one too",
    ),
    Conversation("system later", [user("hi"), system("Now be brief."), user("ok")]),
    Conversation("system alone", [system("Begin.")]),
    Conversation("system and tools", [system("Be brief."), user("hi")], (WEATHER,)),
    Conversation("system, tools, thinking", [system("Be brief."), user("hi")], (WEATHER,), thinking=True),
]
PARTS = [
    Conversation("one text part", [user([text("hi")])]),
    Conversation("two text parts", [user([text("a "), text(" b")])]),
    Conversation("an answer in parts", [user("a"), assistant([text("b"), text("c")]), user("d")]),
    Conversation("image first", [user([IMAGE, text("what is it?")])]),
    Conversation("image last", [user([text("what is it?"), IMAGE])]),
    Conversation("image between", [user([text("this"), IMAGE, text("or what?")])]),
    Conversation("image alone", [user([IMAGE])]),
    Conversation("two images", [user([IMAGE, IMAGE, text("compare")])]),
    Conversation(
        "images in two turns",
        [
            user([IMAGE, text("first")]),
            assistant("one"),
            user([text("second"), IMAGE]),
            assistant("two"),
            user("both?"),
        ],
    ),
    Conversation("image with system", [system("Describe."), user([IMAGE])]),
    Conversation("image with thinking", [user([IMAGE, text("colors?")])], thinking=True),
    Conversation(
        "OpenAI's image part",
        [user([text("see"), {"type": "image_url", "image_url": {"url": "{picture}"}}])],
        plain=[user([text("see"), IMAGE])],
    ),
]
THINKING = [
    Conversation("thinking", [user("hi")], thinking=True),
    Conversation("thinking, system", [system("Be brief."), user("hi")], thinking=True),
    Conversation("thinking, tools", [user("hi")], (WEATHER,), thinking=True),
    Conversation("thinking, three turns", [user("a"), assistant("b"), user("c")], thinking=True),
    Conversation("thought in history", [user("a"), assistant(f"{THOUGHT}b"), user("c")], thinking=True),
    Conversation("thought in history, not thinking", [user("a"), assistant(f"{THOUGHT}b"), user("c")]),
    Conversation("two thoughts in history", [user("a"), assistant(f"{THOUGHT}b {THOUGHT}c"), user("d")]),
    Conversation("an empty thought in history", [user("a"), assistant("<|channel>thought\n<channel|>b"), user("c")]),
    Conversation("an open thought in history", [user("a"), assistant("b<|channel>thought\ncut"), user("c")]),
    Conversation("reasoning in history", [user("a"), assistant("b", reasoning="so"), user("c")], thinking=True),
    Conversation("reasoning_content in history", [user("a"), assistant("b", reasoning_content="so"), user("c")]),
    Conversation("reasoning in the last turn", [user("a"), assistant("b", reasoning="It is b.")]),
    Conversation(
        "reasoning before a call",
        [user("a"), assistant(reasoning="I need rain.", tool_calls=[RAIN]), result("rain", tool_call_id="1")],
        (WEATHER,),
        thinking=True,
    ),
    Conversation(
        "reasoning_content before a call",
        [user("a"), assistant(reasoning_content="I need rain.", tool_calls=[RAIN]), result("rain", tool_call_id="1")],
        (WEATHER,),
    ),
    Conversation(
        "reasoning before a call in history",
        [
            user("a"),
            assistant(reasoning="I need rain.", tool_calls=[RAIN]),
            result("rain", tool_call_id="1"),
            assistant("It rains."),
            user("ok"),
        ],
        (WEATHER,),
        thinking=True,
        ours_differs=TWO_TURNS,
    ),
]
TOOLS = [
    Conversation("a tool", [user("weather?")], (WEATHER,)),
    Conversation("two tools", [user("weather?")], (WEATHER, SEARCH)),
    Conversation("nested schema", [user("plan")], (NESTED,)),
    Conversation("no parameters", [user("time?")], (CLOCK,)),
    Conversation(
        "empty parameters", [user("time?")], (function("now", "The time", {"type": "object", "properties": {}}),)
    ),
    Conversation(
        "no description",
        [user("time?")],
        ({"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},),
    ),
    Conversation(
        "a described answer",
        [user("time?")],
        (function("now", "The time", response={"type": "object", "description": "Hours and minutes"}),),
    ),
    Conversation("bare schema", [user("weather?")], (WEATHER["function"],), plain_tools=[WEATHER]),
    Conversation("Python function", [user("weather?")], (forecast,), plain_tools=[FORECAST]),
    Conversation("a call", [user("a"), assistant(tool_calls=[RAIN])], (WEATHER,)),
    Conversation("a result", [user("a"), assistant(tool_calls=[RAIN]), result("rain", tool_call_id="1")], (WEATHER,)),
    Conversation(
        "a result, thinking",
        [user("a"), assistant(tool_calls=[RAIN]), result("rain", tool_call_id="1")],
        (WEATHER,),
        thinking=True,
    ),
    Conversation(
        "a result in fields",
        [user("a"), assistant(tool_calls=[RAIN]), result({"sky": "rain", "t": 21.5, "wet": True})],
        (WEATHER,),
        plain=[
            user("a"),
            assistant(tool_calls=[RAIN]),
            result('{"sky": "rain", "t": 21.5, "wet": true}', tool_call_id="1"),
        ],
    ),
    Conversation(
        "a result in parts",
        [user("a"), assistant(tool_calls=[RAIN]), result([text("rain"), text(" all day")], tool_call_id="1")],
        (WEATHER,),
    ),
    Conversation(
        "nothing for result",
        [user("a"), assistant(tool_calls=[RAIN]), result(None, tool_call_id="1")],
        (WEATHER,),
    ),
    Conversation("a number for result", [user("a"), assistant(tool_calls=[call("now", {})]), result(12)], (CLOCK,)),
    Conversation(
        "an image for result",
        [user("a"), assistant(tool_calls=[RAIN]), result([text("see"), IMAGE], tool_call_id="1")],
        (WEATHER,),
    ),
    Conversation(
        "a named result", [user("a"), assistant(tool_calls=[call("now", {})]), result("noon", name="now")], (CLOCK,)
    ),
    Conversation(
        "two calls, two results",
        [
            user("a"),
            assistant(tool_calls=[RAIN, call("get_weather", {"city": "rome"}, "2")]),
            result("rain", tool_call_id="1"),
            result("sun", tool_call_id="2"),
        ],
        (WEATHER,),
    ),
    Conversation(
        "two calls, two results, no ids",
        [
            user("a"),
            assistant(tool_calls=[call("get_weather", {"city": "lima"}), call("now", {})]),
            result("rain"),
            result("noon"),
        ],
        (WEATHER, CLOCK),
        plain=[
            user("a"),
            assistant(tool_calls=[RAIN, call("now", {}, "2")]),
            result("rain", tool_call_id="1"),
            result("noon", tool_call_id="2"),
        ],
    ),
    Conversation(
        "results out of order",
        [
            user("a"),
            assistant(tool_calls=[RAIN, call("now", {}, "2")]),
            result("noon", tool_call_id="2"),
            result("rain", tool_call_id="1"),
        ],
        (WEATHER, CLOCK),
    ),
    Conversation(
        "answered after a result",
        [
            user("a"),
            assistant(tool_calls=[RAIN]),
            result("rain", tool_call_id="1"),
            assistant("It rains."),
            user("and now?"),
        ],
        (WEATHER,),
        ours_differs=TWO_TURNS,
    ),
    Conversation(
        "a second call after a result",
        [
            user("a"),
            assistant(tool_calls=[RAIN]),
            result("rain", tool_call_id="1"),
            assistant(tool_calls=[call("get_weather", {"city": "rome"}, "2")]),
            result("sun", tool_call_id="2"),
        ],
        (WEATHER,),
        ours_differs=TWO_TURNS,
    ),
    Conversation(
        "a result, then the user",
        [user("a"), assistant(tool_calls=[RAIN]), result("rain", tool_call_id="1"), user("never mind")],
        (WEATHER,),
    ),
    Conversation(
        "words with a call",
        [user("a"), assistant("Let me see.", tool_calls=[RAIN]), result("rain", tool_call_id="1"), user("so?")],
        (WEATHER,),
    ),
    Conversation(
        "words with a call, answered last",
        [user("a"), assistant("Let me see.", tool_calls=[RAIN]), result("rain", tool_call_id="1")],
        (WEATHER,),
        ours_differs="the hub's closes the model's turn after the words and opens none",
    ),
    Conversation(
        "a call without an answer, then the user",
        [user("a"), assistant(tool_calls=[RAIN]), user("never mind")],
        (WEATHER,),
        ours_differs="the hub's leaves the model's turn open",
    ),
    Conversation(
        "awkward arguments", [user("a"), assistant(tool_calls=[call("do-it", AWKWARD)]), result("done")], (SEARCH,)
    ),
    Conversation("no arguments", [user("a"), assistant(tool_calls=[call("now", {})]), result("noon")], (CLOCK,)),
    Conversation(
        "arguments as JSON",
        [user("a"), assistant(tool_calls=[call("get_weather", '{"city": "lima"}', "1")]), result("rain")],
        (WEATHER,),
        plain=[user("a"), assistant(tool_calls=[RAIN]), result("rain", tool_call_id="1")],
    ),
    Conversation(
        "arguments as an empty string",
        [user("a"), assistant(tool_calls=[call("now", "")]), result("noon")],
        (CLOCK,),
        plain=[user("a"), assistant(tool_calls=[call("now", {})]), result("noon")],
    ),
    Conversation(
        "a call as it was parsed",
        [user("a"), assistant(tool_calls=[ToolCall("get_weather", {"city": "lima"})]), result("rain")],
        (WEATHER,),
        plain=[user("a"), assistant(tool_calls=[call("get_weather", {"city": "lima"})]), result("rain")],
    ),
]
CONVERSATIONS = [*PLAIN, *SYSTEM, *PARTS, *THINKING, *TOOLS]
