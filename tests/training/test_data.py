"""Data files become prompts as in inference and the replies that the model should write; every wrong line is named."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conversations import RAIN, WEATHER, assistant, result, system, text, user
from PIL import Image
from templates import DEMO, demo_processor, processor_with

from mlx_diffusiongemma import ModelConfig, Processor, PromptError, ToolCall, TrainingError
from mlx_diffusiongemma.training.data import mix_records, read_folder, read_records

DATA = Path(__file__).parents[1] / "data"
HUB = os.environ.get("MLX_DG_HUB_TEMPLATES")
LIMIT = 1024


@pytest.fixture(scope="module")
def processor():
    return demo_processor()


@pytest.fixture
def write(tmp_path):
    """A function that writes lines, given as text or as what JSON can say, to train.jsonl; it returns the path."""

    def written(*lines):
        path = tmp_path / "train.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return written


def texts(processor, record):
    """What each example of a record has to learn."""
    return [processor.tokenizer.decode(list(example.reply)) for example in record.examples]


def test_replies_are_what_the_trained_model_writes(processor, write):
    """Each kind of task of the demo: with thoughts, calls, answers of tools, images and earlier turns."""
    rows = [json.loads(line) for line in (DATA / "tiny/prompts.jsonl").read_text().splitlines()]
    lines = []
    for row in rows:
        messages = json.loads(json.dumps(row["messages"]))
        if row["image"]:
            messages[-1]["content"][0]["image"] = str(DATA / "tiny" / row["image"])
        reply = assistant(row["text"], tool_calls=row.get("tool_calls"), reasoning=row.get("thought"))
        lines.append({"messages": [*messages, reply], "tools": row["tools"]})
    records = read_records(write(*lines), processor, LIMIT)
    compared = 0
    for row, record in zip(rows, records, strict=True):
        images = [str(DATA / "tiny" / row["image"])] if row["image"] else []
        asked = processor.prompt(row["messages"], images, row["tools"] or (), row["thinking"])
        assert record.prompt.tokens == list(record.examples[-1].prompt) == asked.tokens
        assert [image.digest for image in record.examples[-1].images] == [image.digest for image in asked.images]
        if processor.parse(processor.tokenizer.encode(row["reference"], add_special_tokens=False)).text == row["text"]:
            assert texts(processor, record)[-1] == row["reference"]
            compared += 1
    assert compared > 0.9 * len(rows)
    assert {row["task"] for row in rows} >= {"think", "tool call", "tool result", "image", "multi"}


def test_prompt_and_completion_are_a_turn_each(processor, write):
    [record] = read_records(write({"prompt": "sort 21", "completion": "12"}), processor, LIMIT)
    assert list(record.examples[0].prompt) == processor.prompt("sort 21").tokens
    assert texts(processor, record) == ["12<turn|>"]
    assert (record.line, record.expected.text, record.prompt.thinking) == (1, "12", False)


def test_every_turn_of_a_conversation_is_an_example(processor, write):
    """Earlier thoughts are learned where they were thought, and left out of later prompts."""
    conversation = [
        system("Be brief."),
        user("a"),
        assistant("b", reasoning="so"),
        user("weather?"),
        assistant(tool_calls=[RAIN], reasoning="I need rain."),
        result("rain"),
        assistant([text("It "), text("rains.")], reasoning="It does."),
        user("thanks"),
    ]
    [record] = read_records(write({"messages": conversation, "tools": [WEATHER]}), processor, LIMIT)
    call = '<|tool_call>call:get_weather{city:<|"|>lima<|"|>}<tool_call|><|tool_response>'
    assert texts(processor, record) == [
        "<|channel>thought\nso\n<channel|>b<turn|>",
        f"<|channel>thought\nI need rain.\n<channel|>{call}",
        "It does.\n<channel|>It rains.<turn|>",  # the prompt after a tool's answer has opened the thought
    ]
    for example, before in zip(record.examples, (2, 4, 6), strict=True):
        asked = processor.prompt(conversation[:before], tools=[WEATHER], thinking=True)
        assert list(example.prompt) == asked.tokens
    assert (record.expected.text, record.expected.thinking) == ("It rains.", "It does.")
    assert record.prompt.thinking and record.prompt.tools


def test_a_tool_call_is_expected_as_one(processor, write):
    [record] = read_records(
        write({"messages": [user("weather?"), assistant(tool_calls=[RAIN])], "tools": [WEATHER]}), processor, LIMIT
    )
    assert record.expected.tool_calls == [ToolCall("get_weather", {"city": "lima"})]


def test_thinking_can_be_said_for_a_line(processor, write):
    """Without it thoughts are not learned; with it a reply without a thought closes the one that the prompt opened."""
    thoughtful = [user("a"), assistant("b", reasoning="so")]
    answered = [user("a"), assistant(tool_calls=[RAIN]), result("rain"), assistant("It rains.")]
    records = read_records(
        write(
            {"messages": thoughtful, "thinking": False},
            {"messages": thoughtful, "thinking": True},
            {"messages": answered, "tools": [WEATHER], "thinking": True},
        ),
        processor,
        LIMIT,
    )
    assert texts(processor, records[0]) == ["b<turn|>"]
    assert texts(processor, records[1]) == ["<|channel>thought\nso\n<channel|>b<turn|>"]
    assert texts(processor, records[2])[1] == "<channel|>It rains.<turn|>"
    assert [record.prompt.thinking for record in records] == [False, True, True]


@pytest.mark.skipif(HUB is None, reason="MLX_DG_HUB_TEMPLATES names no directory")
@pytest.mark.parametrize("name", ["", ".v1_2026-06", ".v2_mlx-community-4bit"])
def test_the_hubs_templates_give_the_same_replies(processor, write, tmp_path, name):
    theirs = processor_with(Path(HUB) / f"chat_template{name}.jinja", tmp_path)
    turns = [user("a"), assistant(tool_calls=[RAIN]), result("rain"), assistant("It rains.", reasoning="hm")]
    for thinking in (False, True):
        path = write({"messages": [*turns, user("b"), assistant(" c\n\nd ")], "tools": [WEATHER], "thinking": thinking})
        [record], [ours] = (read_records(path, each, LIMIT) for each in (theirs, processor))
        whole = [
            f"<|channel>thought\n{reply}" if processor._ends_in_thought(record.prompt) else reply
            for reply in texts(theirs, record)
        ]
        assert whole[0] == texts(processor, ours)[0] and whole[2] == "c\n\nd<turn|>"
        assert whole[1].endswith("It rains.<turn|>")


def test_a_cut_reply_teaches_no_ending(processor, write):
    path = write({"prompt": "count", "completion": "1 2 3 4 5 6 7 8 9"})
    [whole] = read_records(path, processor, LIMIT)
    example = whole.examples[0]
    length = len(example.prompt) + len(example.reply)
    assert read_records(path, processor, length)[0].examples == whole.examples
    [cut] = read_records(path, processor, length - 4)
    assert cut.examples[0].reply == example.reply[:-4] and not cut.examples[0].whole
    assert cut.expected == whole.expected


def test_pictures_are_found_beside_the_file_and_read_once(processor, write, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (96, 48), "red").save(tmp_path / "pictures" / "red.png")
    picture = {"type": "image", "image": "pictures/red.png"}
    linked = {"type": "image_url", "image_url": {"url": "pictures/red.png"}}
    film = {"type": "video", "video": ["pictures/red.png", "pictures/red.png"]}
    path = write(
        {"messages": [user([picture, text("colors?")]), assistant("red"), user("sure?"), assistant("yes")]},
        {"messages": [user([linked, film]), assistant("red")]},
    )
    first, second = read_records(path, processor, LIMIT)
    asked = processor.prompt([user([{"type": "image"}, text("colors?")])], [tmp_path / "pictures" / "red.png"])
    assert list(first.examples[0].prompt) == asked.tokens
    assert first.examples[0].images[0] is first.examples[1].images[0]
    assert len(second.examples[0].images) == 3


def test_pixels_are_read_when_they_are_needed(processor, write, tmp_path):
    """Data sets have more pictures than fit in memory; one that has changed meanwhile would be another example."""
    place = tmp_path / "a.png"
    Image.new("RGB", (96, 48), "red").save(place)
    path = write({"messages": [user([{"type": "image", "image": "a.png"}]), assistant("red")]})
    [record] = read_records(path, processor, LIMIT)
    [image], asked = record.examples[0].images, processor.prepare_image(place)
    assert np.array_equal(image.pixels, asked.pixels) and np.array_equal(image.positions, asked.positions)
    assert (image.soft_tokens, image.digest) == (asked.soft_tokens, asked.digest)
    assert "pixels" not in vars(image) and repr(image) == repr(
        read_records(path, processor, LIMIT)[0].examples[0].images[0]
    )
    Image.new("RGB", (96, 48), "blue").save(place)
    with pytest.raises(TrainingError, match=r"a\.png has changed since training began"):
        image.pixels  # noqa: B018
    place.unlink()
    with pytest.raises(PromptError, match=r"a\.png"):
        image.pixels  # noqa: B018


GOOD = {"prompt": "a", "completion": "b"}
WRONG = {
    "torn": ('{"prompt": "a", "comp', "not whole JSON"),
    "two objects": (json.dumps(GOOD) * 2, "not whole JSON"),
    "a list": ([GOOD], "not a JSON object"),
    "text alone": ({"text": "a b"}, "of no form that is known here, having 'text'"),
    "nothing": ({}, "of no form that is known here, having nothing"),
    "a completion in messages": ({"prompt": "a", "completion": [assistant("b")]}, "`completion` must be text"),
    "no messages": ({"messages": []}, "There are no messages"),
    "an unknown role": ({"messages": [user("a"), {"role": "bot", "content": "b"}]}, "Message 2 has the role 'bot'"),
    "two users": ({"messages": [user("a"), user("b"), assistant("c")]}, "Message 2, the user's, follows the user's"),
    "the assistant first": ({"messages": [assistant("b")]}, "Message 1, the assistant's, begins the conversation"),
    "two replies": ({"messages": [user("a"), assistant("b"), assistant("c")]}, "Message 3, the assistant's, follows"),
    "a late system": ({"messages": [user("a"), system("b"), assistant("c")]}, "Message 2, the system's, follows"),
    "an answer without a call": ({"messages": [user("a"), assistant("b"), result("c")]}, "answers no tool call"),
    "no assistant": ({"messages": [user("a")]}, "no assistant's message"),
    "an empty reply": ({"prompt": "a", "completion": " \n"}, "Message 2, the assistant's, is empty"),
    "a thought alone": (
        {"messages": [user("a"), assistant("", reasoning="so")]},
        "Message 2, the assistant's, is empty",
    ),
    "an odd thought": ({"messages": [user("a"), assistant("b", reasoning=1)]}, "`reasoning` must be text"),
    "odd thinking": ({"messages": [user("a"), assistant("b")], "thinking": "yes"}, "`thinking` must be true or false"),
    "a marker": ({"prompt": "a", "completion": "b<turn|>c"}, "leave markers of the chat format out"),
    "a written call": ({"prompt": "a", "completion": "<|tool_call>call:f{}<tool_call|>"}, "tool calls are not read"),
    "a missing image": ({"messages": [user([{"type": "image", "image": "no.png"}]), assistant("b")]}, "no.png"),
    "an image of nothing": ({"messages": [user([{"type": "image"}]), assistant("b")]}, "An image part has no image"),
    "an odd tool": ({**GOOD, "tools": [3]}, "Tool 1 is a int"),
    "a long prompt": ({"prompt": "a" * LIMIT, "completion": "b"}, "raise --max-seq-length or shorten"),
}


@pytest.mark.parametrize("line, reason", WRONG.values(), ids=WRONG)
def test_a_wrong_line_is_named(processor, write, line, reason):
    path = write(GOOD, "", line)
    with pytest.raises(TrainingError) as raised:
        read_records(path, processor, LIMIT)
    assert str(raised.value).startswith(f"{path}, line 3: ") and reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_image_needs_a_model_that_sees(processor, write):
    blind = Processor(processor.tokenizer, replace(ModelConfig.from_directory(DEMO), vision=None))
    path = write({"messages": [user([{"type": "image", "image": "a.png"}]), assistant("b")]})
    with pytest.raises(TrainingError, match="line 1: This checkpoint cannot see images"):
        read_records(path, blind, LIMIT)


def test_files_and_folders_that_are_not_there(processor, write, tmp_path):
    with pytest.raises(TrainingError, match="nowhere is no folder"):
        read_folder(tmp_path / "nowhere", processor, LIMIT)
    with pytest.raises(TrainingError, match=r"has no train\.jsonl"):
        read_folder(tmp_path, processor, LIMIT)
    with pytest.raises(TrainingError, match=r"train\.jsonl is empty"):
        read_records(write("", ""), processor, LIMIT)
    with pytest.raises(TrainingError, match="cannot be read"):
        read_records(tmp_path, processor, LIMIT)
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "ä", "completion": "b"}'.encode("latin-1"))
    with pytest.raises(TrainingError, match="line 1: It is not UTF-8"):
        read_records(path, processor, LIMIT)


def test_a_folder_has_up_to_three_files(processor, write, tmp_path):
    write(GOOD, GOOD).rename(tmp_path / "valid.jsonl")
    write(GOOD)
    read = read_folder(tmp_path, processor, LIMIT)
    assert {name: len(records) for name, records in read.items()} == {"train": 1, "valid": 2, "test": 0}


def test_old_tasks_make_up_their_share(processor, write):
    new = read_records(write(*[{"prompt": f"n{i}", "completion": "b"} for i in range(19)]), processor, LIMIT)
    old = read_records(write(*[{"prompt": f"o{i}", "completion": "b"} for i in range(4)]), processor, LIMIT)
    assert mix_records(new, old, 0, seed=1) == new
    assert [record in old for record in mix_records(new, old, 0.05, seed=1)] == [False] * 19 + [True]
    half = mix_records(new, old, 0.5, seed=1)
    counts = [half.count(record) for record in old]
    assert sorted(counts) == [4, 5, 5, 5]
    assert half == mix_records(new, old, 0.5, seed=1) != mix_records(new, old, 0.5, seed=2)
    with pytest.raises(TrainingError, match="from 0 to below 1"):
        mix_records(new, old, 1.0, seed=1)
