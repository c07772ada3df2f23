"""Processors that speak with one chat template or another, for tests and for the script that writes expectations.

    python tests/templates.py

writes tests/data/templates/rendered.json anew: what our template makes of every conversation. Read its diff.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from conversations import CONVERSATIONS, Conversation
from PIL import Image

import mlx_diffusiongemma
from mlx_diffusiongemma import ModelConfig, Processor, Prompt

DEMO = Path(mlx_diffusiongemma.__file__).parent / "demo"
RENDERED = Path(__file__).parent / "data" / "templates" / "rendered.json"


def demo_processor() -> Processor:
    return Processor.from_directory(DEMO, ModelConfig.from_directory(DEMO))


def processor_with(template: Path, directory: Path) -> Processor:
    """The demo's tokenizer with another chat template, from a checkpoint made in `directory`."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(DEMO / name, directory)
    shutil.copy(template, directory / "chat_template.jinja")
    return Processor.from_directory(directory, ModelConfig.from_directory(directory))


def ask(processor: Processor, conversation: Conversation) -> Prompt:
    """The conversation's prompt, pictures of growing width in its image parts; its messages must not change."""
    messages, picture = conversation.messages, str(Path(__file__).parent / "data" / "templates" / "picture.png")
    messages = json_map(messages, lambda value: picture if value == "{picture}" else value)
    before = copy.deepcopy(messages)
    images = [Image.new("RGB", (48 * n, 48), "red") for n in range(1, 1 + count_images(messages))]
    prompt = processor.prompt(messages, images=images, tools=conversation.tools, thinking=conversation.thinking)
    assert messages == before
    return prompt


def json_map(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_map(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [json_map(item, change) for item in value]
    return change(value)


def count_images(messages: list[Any]) -> int:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return sum(part == {"type": "image"} for content in contents for part in content)


if __name__ == "__main__":
    processor = demo_processor()
    rendered = {conversation.name: ask(processor, conversation).text for conversation in CONVERSATIONS}
    RENDERED.write_text(json.dumps(rendered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
