"""The processor: prompts in every form a caller has, tokenizers in every form a checkpoint has, and what is refused."""

import json
import shutil
from dataclasses import replace
from typing import Literal

import pytest
from PIL import Image
from templates import DEMO, demo_processor

from mlx_diffusiongemma import CheckpointError, ModelConfig, Processor, Prompt, PromptError, ToolCall

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def processor():
    return demo_processor()


@pytest.fixture
def checkpoint(tmp_path):
    for name in (*TOKENIZER_FILES, "config.json", "processor_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def load(directory, config=None):
    return Processor.from_directory(directory, config or ModelConfig.from_directory(DEMO))


def user(content):
    return {"role": "user", "content": content}


def test_a_string_is_one_user_turn(processor):
    prompt = processor.prompt("hi")
    assert prompt.text == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"
    assert prompt == processor.prompt([user("hi")])
    assert processor.tokenizer.decode(prompt.tokens) == prompt.text


def test_thinking_is_off_unless_asked_for(processor):
    assert "<|think|>" not in processor.prompt("hi").text
    assert "<|think|>" in processor.prompt("hi", thinking=True).text


def test_a_raw_prompt_is_the_text_after_its_beginning(processor):
    prompt = processor.raw_prompt("def f(x):")
    assert (prompt.text, prompt.tokens[0]) == ("<bos>def f(x):", processor.tokenizer.bos_token_id)
    assert processor.tokenizer.decode(prompt.tokens[1:]) == "def f(x):"
    assert processor.raw_prompt("").tokens == [processor.tokenizer.bos_token_id]


def test_tokens_are_taken_as_they_are(processor):
    tokens = processor.prompt("hi").tokens
    assert processor.prompt(tokens).tokens == tokens
    assert processor.prompt(tuple(tokens)) == processor.prompt("hi")


def test_a_prompt_is_returned_as_it_is(processor):
    prompt = processor.prompt("hi")
    assert processor.prompt(prompt) is prompt


def test_messages_are_not_changed(processor):
    arguments = {"city": "lima"}
    messages = [
        user([{"type": "text", "text": "?"}]),
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "content": {"sky": "rain"}},
    ]
    tools = [{"name": "f"}]
    before = json.dumps([messages, tools])
    processor.prompt(messages, tools=tools)
    assert json.dumps([messages, tools]) == before


def test_images_fill_the_parts_without_a_source(processor, tmp_path):
    Image.new("RGB", (96, 48)).save(tmp_path / "wide.png")
    wide, square = str(tmp_path / "wide.png"), Image.new("RGB", (48, 48))
    messages = [user([{"type": "image"}, {"type": "image", "image": wide}, {"type": "image"}])]
    prompt = processor.prompt(messages, images=[square, tmp_path / "wide.png"])
    first, second, third = prompt.images
    assert second.digest == third.digest != first.digest
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image|>")
    assert prompt.tokens.count(image_token) == sum(image.soft_tokens for image in prompt.images)
    assert processor.prompt(messages, images=prompt.images[::2]).tokens == prompt.tokens


def test_images_come_before_a_string(processor):
    image = Image.new("RGB", (48, 48))
    assert processor.prompt("hi", images=[image]).text == (
        processor.prompt([user([{"type": "image"}, {"type": "text", "text": "hi"}])], images=[image]).text
    )


def test_the_image_budget_is_the_checkpoints_or_the_callers(processor):
    image = Image.new("RGB", (960, 960))
    [small] = processor.prompt("hi", images=[image]).images
    [large] = processor.prompt("hi", images=[image], image_budget=280).images
    assert (processor.image_budget, small.soft_tokens, large.soft_tokens) == (70, 64, 256)


def forecast(city: str, days: int = 1, sky: Literal["sun", "rain"] | None = None) -> str:
    """Tell the weather.

    Args:
        city: Where
        days: How many
        sky: Only days like this
    """
    return f"{city} {days} {sky}"


def undescribed(city: str) -> str:
    """Tell the weather."""
    return city


def untyped(city):
    """Tell the weather.

    Args:
        city: Where
    """
    return city


def test_a_python_function_is_a_tool(processor):
    assert (
        'declaration:forecast{description:<|"|>Tell the weather.<|"|>,parameters:{properties:{'
        'city:{description:<|"|>Where<|"|>,type:<|"|>STRING<|"|>},'
        'days:{description:<|"|>How many<|"|>,type:<|"|>INTEGER<|"|>},'
        'sky:{description:<|"|>Only days like this<|"|>,enum:[<|"|>sun<|"|>,<|"|>rain<|"|>],nullable:true,'
        'type:<|"|>STRING<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
    ) in processor.prompt("hi", tools=[forecast]).text


CALL = {"role": "assistant", "tool_calls": [ToolCall("f", {})]}
DEEP: dict = {}
for _ in range(2000):
    DEEP = {"type": "object", "properties": {"x": DEEP}}
REFUSED = {
    "not a prompt": ({"text_or_messages": 7}, "not a int"),
    "bytes": ({"text_or_messages": b"hi"}, "not a bytes"),
    "one message": ({"text_or_messages": user("hi")}, "not a dict"),
    "no messages": ({"text_or_messages": []}, "no messages"),
    "ids beyond the vocabulary": ({"text_or_messages": [2, 384]}, "384"),
    "negative ids": ({"text_or_messages": [2, -1]}, "-1"),
    "truth values": ({"text_or_messages": [True]}, "Message 1"),
    "half a surrogate pair": ({"text_or_messages": "a\ud83d"}, "Unicode"),
    "tokens and tools": ({"text_or_messages": [2, 3], "tools": [forecast]}, "already in tokens"),
    "a prompt and thinking": ({"text_or_messages": Prompt("a", [2]), "thinking": True}, "already in tokens"),
    "message is text": ({"text_or_messages": [user("a"), "b"]}, "Message 2"),
    "no role": ({"text_or_messages": [{"content": "a"}]}, "role None"),
    "unknown role": ({"text_or_messages": [{"role": "robot", "content": "a"}]}, "'robot'"),
    "role is a list": ({"text_or_messages": [{"role": [], "content": "a"}]}, "role"),
    "no content": ({"text_or_messages": [{"role": "user"}]}, "no `content`"),
    "content is a number": ({"text_or_messages": [user(3)]}, "not a int"),
    "content is nothing": ({"text_or_messages": [user(None)]}, "NoneType"),
    "part is text": ({"text_or_messages": [user(["a"])]}, "part"),
    "part without text": ({"text_or_messages": [user([{"type": "text"}])]}, "part"),
    "audio": ({"text_or_messages": [user([{"type": "audio"}])]}, "text and images"),
    "an assistant's image": ({"text_or_messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "images"),
    "reasoning is a list": ({"text_or_messages": [{"role": "assistant", "reasoning": ["a"]}]}, "reasoning"),
    "a user's call": ({"text_or_messages": [{**CALL, "role": "user", "content": ""}]}, "assistant"),
    "calls are text": ({"text_or_messages": [{**CALL, "tool_calls": "f()"}]}, "a list"),
    "call is text": ({"text_or_messages": [{**CALL, "tool_calls": ["f()"]}]}, "a tool call is"),
    "call without a name": ({"text_or_messages": [{**CALL, "tool_calls": [{"function": {}}]}]}, "a tool call is"),
    "arguments not JSON": (
        {"text_or_messages": [{**CALL, "tool_calls": [{"name": "f", "arguments": "{a"}]}]},
        "not valid JSON",
    ),
    "arguments a list": ({"text_or_messages": [{**CALL, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "object"),
    "argument names not text": ({"text_or_messages": [{**CALL, "tool_calls": [ToolCall("f", {1: 2})]}]}, "object"),
    "answer without a call": ({"text_or_messages": [user("a"), {"role": "tool", "content": "b"}]}, "no tool call"),
    "two answers to a call": ({"text_or_messages": [CALL, *[{"role": "tool", "content": "b"}] * 2]}, "Message 3"),
    "call id a number": ({"text_or_messages": [{**CALL, "tool_calls": [{"name": "f", "id": 7}]}]}, "`id` must be text"),
    "call id a list": ({"text_or_messages": [{**CALL, "tool_calls": [{"name": "f", "id": []}]}]}, "`id` must be text"),
    "answer id a number": (
        {"text_or_messages": [CALL, {"role": "tool", "content": "b", "tool_call_id": 7}]},
        "`tool_call_id` must be text",
    ),
    "an answer's calls": (
        {"text_or_messages": [CALL, {"role": "tool", "content": "b", "tool_calls": ["f"]}]},
        "only the assistant",
    ),
    "answer not JSON": ({"text_or_messages": [CALL, {"role": "tool", "content": {"a": object()}}]}, "JSON"),
    "one tool": ({"tools": {"name": "f"}}, "list"),
    "tool is a function, no list": ({"tools": forecast}, "list"),
    "tool is text": ({"tools": ["f"]}, "Tool 1"),
    "tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "name"),
    "tool without a function": ({"tools": [{"type": "function"}]}, "Tool 1"),
    "tool of another type": ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "Tool 1"),
    "tool name with spaces": ({"tools": [{"name": "f g"}]}, "'f g'"),
    "two tools of one name": ({"tools": [{"name": "f"}, {"name": "f"}]}, "Several"),
    "description is a list": ({"tools": [{"name": "f", "description": ["a"]}]}, "description"),
    "parameters is a list": ({"tools": [{"name": "f", "parameters": [1]}]}, "`parameters`"),
    "properties is a list": (
        {"tools": [{"name": "f", "parameters": {"properties": ["a"]}}]},
        "`parameters.properties`",
    ),
    "property is text": (
        {"tools": [{"name": "f", "parameters": {"properties": {"a": "string"}}}]},
        "`parameters.properties.a`",
    ),
    "type is a number": ({"tools": [{"name": "f", "parameters": {"type": 3}}]}, "`parameters.type`"),
    "required is text": ({"tools": [{"name": "f", "parameters": {"required": "a"}}]}, "`parameters.required`"),
    "items wrong": (
        {"tools": [{"name": "f", "parameters": {"properties": {"a": {"type": "array", "items": {"type": 1}}}}}]},
        "`parameters.properties.a.items.type`",
    ),
    "nested too deep": ({"tools": [{"name": "f", "parameters": DEEP}]}, "levels"),
    "function without descriptions": ({"tools": [undescribed]}, "'undescribed'"),
    "function without types": ({"tools": [untyped]}, "'untyped'"),
    "builtin function": ({"tools": [len]}, "'len'"),
    "one image": ({"images": "a.png"}, "list"),
    "one picture": ({"images": Image.new("RGB", (9, 9))}, "list"),
    "no list of images": ({"images": None}, "list"),
    "no list of tools": ({"tools": None}, "list"),
    "no such image": ({"images": ["nowhere.png"]}, "nowhere.png"),
    "an image too many": ({"text_or_messages": [user("a")], "images": [Image.new("RGB", (9, 9))]}, "images given: 1"),
    "an image too few": ({"text_or_messages": [user([{"type": "image"}])]}, "images given: 0"),
    "a place holder in the text": ({"text_or_messages": "<|image|>", "images": [Image.new("RGB", (9, 9))]}, "2 places"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_said_in_one_sentence(processor, case):
    settings, words = case
    with pytest.raises(PromptError) as error:
        processor.prompt(**{"text_or_messages": "hi", **settings})
    sentence = str(error.value)
    assert words in sentence
    assert "\n" not in sentence
    assert sentence.endswith((".", "…"))
    assert processor.prompt("hi").tokens  # and nothing is left behind


def test_a_raw_prompt_is_text(processor):
    with pytest.raises(PromptError, match="raw prompt is text"):
        processor.raw_prompt([user("hi")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('Only one turn is possible.') }}",
        "{{ messages[7].content }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_is_one_sentence(checkpoint, template):
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(PromptError, match="template") as error:
        load(checkpoint).prompt("hi")
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_template_takes_raw_text(checkpoint):
    (checkpoint / "chat_template.jinja").unlink()
    processor = load(checkpoint)
    assert processor.raw_prompt("hi").tokens
    with pytest.raises(PromptError, match=r"no chat template"):
        processor.prompt("hi")


def test_a_template_inside_tokenizer_config(checkpoint):
    (checkpoint / "chat_template.jinja").unlink()
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{{ messages[0].content }}!"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(checkpoint).prompt("hi").text == "<bos>hi!"


def test_a_checkpoint_that_cannot_see(checkpoint):
    config = replace(ModelConfig.from_directory(DEMO), vision=None)
    processor = load(checkpoint, config)
    assert processor.prompt("hi").tokens
    with pytest.raises(PromptError, match="cannot see images"):
        processor.prompt("hi", images=[Image.new("RGB", (48, 48))])


def test_the_image_budget_is_280_where_the_checkpoint_is_silent(checkpoint):
    (checkpoint / "processor_config.json").unlink()
    assert load(checkpoint).image_budget == 280
    (checkpoint / "preprocessor_config.json").write_text('{"max_soft_tokens": 140}')
    assert load(checkpoint).image_budget == 140


def test_no_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", "\0"])
def test_a_damaged_tokenizer(checkpoint, content):
    (checkpoint / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(checkpoint)


def test_a_tokenizer_without_its_configuration_still_begins_documents(checkpoint):
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "config.json").unlink()
    assert load(checkpoint).prompt("hi").tokens == demo_processor().prompt("hi").tokens


def test_special_tokens_are_found_by_name(checkpoint):
    """The same pieces at other ids read the same."""
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    moved = {token: (token + 100) % 384 for token in range(384)}
    content["model"]["vocab"] = {piece: moved[token] for piece, token in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] = moved[token["id"]]
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    processor, ours = load(checkpoint), demo_processor()
    assert processor.prompt("hi").tokens == [moved[token] for token in ours.prompt("hi").tokens]
    written = '<|channel>thought\nhm\n<channel|>a<|tool_call>call:f{x:<|"|>y<|"|>}<tool_call|><turn|>b'
    tokens = ours.tokenizer.encode(written, add_special_tokens=False)
    assert processor.parse([moved[token] for token in tokens]) == ours.parse(tokens)


def test_ids_that_only_the_embedding_has_read_as_nothing():
    config = ModelConfig.from_directory(DEMO)
    processor = Processor.from_directory(DEMO, replace(config, text=replace(config.text, vocab_size=400)))
    a = processor.tokenizer.convert_tokens_to_ids("a")
    assert processor.draft_text([399, a, 384]) == "a"
    assert processor.parse([384, a, 399]).text == "a"
