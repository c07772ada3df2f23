"""Rendered prompts: our template against what it rendered before, the hub's against Transformers.

The hub's templates are not part of this project. MLX_DG_HUB_TEMPLATES names a directory that has them.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conversations import CONVERSATIONS, RAIN, Conversation, assistant, result, text, user
from PIL import Image
from templates import DEMO, RENDERED, ask, demo_processor, processor_with

from mlx_diffusiongemma.processing.images import prepare_image

HUB = os.environ.get("MLX_DG_HUB_TEMPLATES")
CURRENT = "chat_template.jinja"
HUB_TEMPLATES = (CURRENT, "chat_template.v1_2026-06.jinja", "chat_template.v2_mlx-community-4bit.jinja")
EVAL = [json.loads(line) for line in (Path(__file__).parents[1] / "data/tiny/prompts.jsonl").read_text().splitlines()]
ROOM = re.compile(r"<\|image>((?:<\|image\|>)+)<image\|>")

needs_hub = pytest.mark.skipif(HUB is None, reason="MLX_DG_HUB_TEMPLATES names no directory")


@pytest.fixture(scope="module")
def ours():
    return demo_processor()


@pytest.fixture(scope="module", params=HUB_TEMPLATES)
def hub(request, tmp_path_factory):
    return processor_with(Path(HUB) / request.param, tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def current(tmp_path_factory):
    return processor_with(Path(HUB) / CURRENT, tmp_path_factory.mktemp("hub"))


def by_transformers(processor, conversation):
    """What Transformers' own `apply_chat_template` makes of the conversation in its plain form: text and tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = processor.tokenizer._tokenizer  # mlx-lm's wrapper has settings of its own
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    messages = conversation.messages if conversation.plain is None else conversation.plain
    tools = list(conversation.tools) if conversation.plain_tools is None else conversation.plain_tools
    settings = {"tools": tools or None, "enable_thinking": conversation.thinking, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    return text, tokenizer.apply_chat_template(messages, tokenize=True, **settings)["input_ids"]


def test_the_table_is_large_and_its_names_are_unique():
    assert len(CONVERSATIONS) >= 60
    assert len({conversation.name for conversation in CONVERSATIONS}) == len(CONVERSATIONS)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda conversation: conversation.name)
def test_our_template(ours, conversation):
    prompt = ask(ours, conversation)
    assert prompt.text == json.loads(RENDERED.read_text(encoding="utf-8"))[conversation.name]
    assert prompt.tokens == ours.tokenizer.encode(prompt.text, add_special_tokens=False)
    assert prompt.tokens.count(ours.tokenizer.bos_token_id) == 1
    assert [room.count("<|image|>") for room in ROOM.findall(prompt.text)] == [i.soft_tokens for i in prompt.images]


@needs_hub
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda conversation: conversation.name)
def test_a_hub_template_as_transformers_renders_it(hub, conversation):
    prompt = ask(hub, conversation)
    text, tokens = by_transformers(hub, conversation)
    assert ROOM.sub("<|image|>", prompt.text) == text
    if not prompt.images:
        assert prompt.tokens == tokens


@needs_hub
def test_a_video_as_gemmas_processor_words_it(hub, ours, current):
    """Transformers renders one place holder for a video, which its processor replaces by frames and times."""
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    frames, times = [Image.new("RGB", (96, 48), color) for color in ("red", "blue", "green")], [0, 1 / 24, 2 / 24]
    tokens = SimpleNamespace(boi_token="<|image>", eoi_token="<image|>", video_token="<|image|>")
    made = {
        "num_soft_tokens_per_video": [prepare_image(frames[0], budget=70).soft_tokens],
        "video_metadata": [SimpleNamespace(fps=24, timestamps=times)],
    }
    worded = Gemma4Processor.replace_video_token(tokens, made, 0)
    for parts in (["V"], ["a ", "V", " b"], ["V", "V", "c"], ["a", "V", "\nb\n", "V"]):
        theirs = [{"type": "video"} if part == "V" else text(part) for part in parts]
        ours_too = [{"type": "video", "video": frames} if part == "V" else text(part) for part in parts]
        call = assistant(tool_calls=[RAIN])
        for before, said in (([], user), ([user("a"), call], lambda content: result(content, tool_call_id="1"))):
            expected, _ = by_transformers(hub, Conversation("video", [*before, said(theirs)]))
            assert hub.prompt([*before, said(ours_too)]).text == expected.replace("<|video|>", worded)
            prompts = [processor.prompt([*before, said(ours_too)]) for processor in (ours, current)]
            assert prompts[0].tokens == prompts[1].tokens


@needs_hub
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda conversation: conversation.name)
def test_our_template_says_what_the_hub_says(ours, current, conversation):
    assert (ask(ours, conversation).tokens == ask(current, conversation).tokens) is (not conversation.ours_differs)


@needs_hub
def test_our_template_asks_the_checkpoint_what_it_was_trained_on(ours, current):
    for question in EVAL:
        images = [Path(__file__).parents[1] / "data/tiny" / question["image"]] if question["image"] else []
        asked = {"images": images, "tools": question["tools"] or (), "thinking": question["thinking"]}
        prompts = [processor.prompt(question["messages"], **asked) for processor in (ours, current)]
        assert prompts[0].tokens == prompts[1].tokens


@needs_hub
def test_the_hubs_templates_are_not_in_the_project():
    for name in HUB_TEMPLATES:
        lines = [line.strip() for line in (Path(HUB) / name).read_text().splitlines()]
        own = [line.strip() for line in (DEMO / "chat_template.jinja").read_text().splitlines()]
        copied = [line for line in own if len(line) > 40 and line in lines]
        assert not copied
