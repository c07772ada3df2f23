"""Training data: JSONL files, as `mlx_lm.lora` reads them, become prompts and the replies to learn."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PromptError, TrainingError
from ..paths import user_path
from ..processing.images import PreparedImage
from ..processing.messages import VideoPart, normalize_messages
from ..processing.turns import ReplyWriter, thought_of

if TYPE_CHECKING:
    from ..events import Reply
    from ..processing.processor import Processor, Prompt

FILES = ("train", "valid", "test")
FORMS = '{"messages": […]} or {"prompt": "…", "completion": "…"}'
# What each role may follow; a system message only begins. Tools' answers are matched to calls elsewhere.
FOLLOWS = {
    "system": ("",),
    "developer": ("",),
    "user": ("", "system", "developer", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True)
class Example:
    """One reply to learn and everything before it.

    prompt: the tokens before the reply, as in inference.
    reply: the assistant's text and what ends its turn, `<turn|>` or, after tool calls, `<|tool_response>`.
    images: of the prompt, in the order of their tokens.
    whole: False where the reply was cut by the length limit, so that it teaches no ending.
    """

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    images: tuple[PreparedImage, ...] = ()
    whole: bool = True


@dataclass(frozen=True)
class Record:
    """One line of a data file: a conversation, of whose assistant turns one is drawn each time.

    examples: one for each assistant turn, at least one.
    line: its number in the file, for messages.
    prompt: what the last reply answers; `generate` takes it as it is.
    expected: the last reply, uncut, as it is read from its tokens.
    """

    examples: tuple[Example, ...]
    line: int
    prompt: Prompt
    expected: Reply


class FileImage(PreparedImage):
    """An image that is prepared from its file whenever its pixels, some 8 MB, are asked for.

    Raises PromptError where it cannot be read, and TrainingError, later, where it has changed since.
    """

    _path: Path
    _processor: Processor

    def __init__(self, path: Path, processor: Processor) -> None:
        prepared = processor.prepare_image(path)
        kept = {name: getattr(prepared, name) for name in ("positions", "soft_tokens", "digest")}
        for name, value in {**kept, "_path": path, "_processor": processor}.items():
            object.__setattr__(self, name, value)  # as a frozen dataclass sets its fields

    @property
    def pixels(self) -> np.ndarray:
        prepared = self._processor.prepare_image(self._path)
        if prepared.digest != self.digest:
            raise TrainingError(f"{self._path} has changed since training began; put the image back and resume.")
        return prepared.pixels

    def __repr__(self) -> str:
        return f"FileImage({self.digest})"


def read_folder(
    folder: str | Path, processor: Processor, max_tokens: int, required: Sequence[str] = ("train",)
) -> dict[str, list[Record]]:
    """Read {train,valid,test}.jsonl in `folder`: records by name, none for a file that is not there.

    required: those that have to be there. Raises TrainingError.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise TrainingError(f"{folder} is no folder; give one that holds train.jsonl and, if you like, valid.jsonl.")
    paths = {name: folder / f"{name}.jsonl" for name in FILES}
    for name in required:
        if not paths[name].exists():
            raise TrainingError(f"{folder} has no {name}.jsonl; write one with a line for each example, {FORMS}.")
    return {name: read_records(path, processor, max_tokens) if path.exists() else [] for name, path in paths.items()}


def read_records(path: str | Path, processor: Processor, max_tokens: int) -> list[Record]:
    """Read a JSONL file with a conversation on each line; blank lines are skipped.

    A line is {"messages": […], "tools": […]}, or {"prompt": "…", "completion": "…"} for one turn. Messages are those
    that `processor.prompt` takes, with images as paths from the file's folder. The prompts ask for thinking where
    "thinking" is true, or where it is not given and an assistant's message has `reasoning`.
    max_tokens: most tokens of a prompt and its reply; a reply is cut there.
    Raises TrainingError, which names the line.
    """
    path = user_path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}).") from None
    records, writer = [], ReplyWriter(processor)
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                records.append(_record(_parse(line), number, path.parent, processor, writer, max_tokens))
            except PromptError as error:
                raise TrainingError(f"{path}, line {number}: {error}") from None
    if not records:
        raise TrainingError(f"{path} is empty; write a line for each example, {FORMS}.")
    return records


def mix_records(records: Sequence[Record], others: Sequence[Record], share: float, seed: int) -> list[Record]:
    """Add as many of `others`, drawn with `seed`, as make up `share` (0 ≤ share < 1) of the result, repeating them
    evenly where they are too few: examples of what the model shall not forget. Raises TrainingError.
    """
    if not 0 <= share < 1:
        raise TrainingError(f"The share of the examples that are mixed in is {share}; give one from 0 to below 1.")
    wanted = round(len(records) * share / (1 - share))
    rounds, rest = divmod(wanted, len(others))
    return [*records, *list(others) * rounds, *random.Random(seed).sample(others, rest)]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except UnicodeDecodeError:
        raise PromptError("It is not UTF-8 text; convert the file first.") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise PromptError(f"It is not whole JSON ({reason}); complete the line or remove it.") from None
    if not isinstance(content, dict):
        raise PromptError(f"It is not a JSON object; write {FORMS}.")
    return content


def _record(
    content: Mapping[str, Any], line: int, folder: Path, processor: Processor, writer: ReplyWriter, max_tokens: int
) -> Record:
    messages, sources = normalize_messages(_messages(content))
    _check_order(messages)
    messages = _with_pictures(messages, sources, folder, processor)
    thinking = content.get("thinking")
    if thinking is None:
        thinking = any(thought_of(message) for message in messages if message["role"] == "assistant")
    if not isinstance(thinking, bool):
        raise PromptError("`thinking` must be true or false.")
    examples = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not message["tool_calls"] and not _says_something(message["content"]):
            raise PromptError(f"Message {number + 1}, the assistant's, is empty; there is nothing to learn from it.")
        prompt = processor.prompt(messages[:number], tools=content.get("tools") or (), thinking=thinking)
        room = max_tokens - len(prompt.tokens)
        if room < 1:
            raise PromptError(
                f"The prompt before message {number + 1} has {len(prompt.tokens)} tokens, which leaves no room for a "
                f"reply in {max_tokens}; raise --max-seq-length or shorten it."
            )
        tokens, reply = writer.write(message, prompt)
        examples.append(Example(tuple(prompt.tokens), tokens[:room], prompt.images, whole=len(tokens) <= room))
    if not examples:
        raise PromptError("It has no assistant's message; there is nothing to learn from it.")
    return Record(tuple(examples), line, prompt, reply)


def _messages(content: Mapping[str, Any]) -> list[Any]:
    """Find the conversation on a line. Raises PromptError."""
    if "prompt" in content and "completion" in content:
        for key in ("prompt", "completion"):
            if not isinstance(content[key], str):
                raise PromptError(f"`{key}` must be text, not a {type(content[key]).__name__}.")
        return [{"role": "user", "content": content["prompt"]}, {"role": "assistant", "content": content["completion"]}]
    messages = content.get("messages")
    if not isinstance(messages, list):
        keys = ", ".join(map(repr, content)) or "nothing"
        raise PromptError(f"It is of no form that is known here, having {keys}; write {FORMS}.")
    return messages


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises PromptError where roles are out of order."""
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in FOLLOWS[role]:
            place = f"follows the {before}'s" if before else "begins the conversation"
            raise PromptError(
                f"Message {number}, the {role}'s, {place}; after a system message, if any, users and the assistant "
                "take turns, and tools answer the assistant's calls."
            )
        before = role


def _says_something(content: Any) -> bool:
    return bool(content.strip() if isinstance(content, str) else any(part["text"].strip() for part in content))


def _with_pictures(
    messages: Sequence[dict[str, Any]], sources: Sequence[Any], folder: Path, processor: Processor
) -> list[dict[str, Any]]:
    """Put prepared images and videos into the parts that show them, the same ones for all prompts of a conversation.
    Raises PromptError.
    """
    waiting = iter(sources)

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        source = next(waiting)
        if source is None:
            raise PromptError('An image part has no image; write {"type": "image", "image": "PATH"}.')
        if isinstance(source, VideoPart):
            place = _place(source.source, folder)
            return {"type": "video", "video": processor.prepare_video(place, frames=source.frames, fps=source.fps)}
        place = _place(source, folder)
        prepared = FileImage(place, processor) if isinstance(place, Path) else processor.prepare_image(place)
        return {"type": "image", "image": prepared}

    return [
        {**message, "content": [filled(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _place(source: Any, folder: Path) -> Any:
    """Resolve a path, or each in a list of frames, from `folder`; URLs stay as they are."""
    if isinstance(source, list):
        return [_place(frame, folder) for frame in source]
    if not isinstance(source, str) or source[:5].lower() == "data:" or "://" in source:
        return source
    return folder / user_path(source)
