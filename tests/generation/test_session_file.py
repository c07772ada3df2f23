"""Saved conversations: they go on where they were, and no file that is not one of ours gets in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from PIL import Image

from mlx_diffusiongemma import ChatSession, CheckpointError, GenerationOptions, PromptError, collect, load
from mlx_diffusiongemma.checkpoints import session_file
from mlx_diffusiongemma.checkpoints.safetensors import write_header
from mlx_diffusiongemma.checkpoints.session_file import read_session, write_session

OPTIONS = GenerationOptions(seed=0, max_tokens=128, max_steps=8)


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


@pytest.fixture
def chat(demo):
    return ChatSession(*demo, options=OPTIONS)


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
    with pytest.raises(PromptError, match="cannot be written to"):
        chat.save(tmp_path / "missing" / "chat")
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(PromptError, match="cannot be written to"):
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


def test_a_file_in_which_ids_repeat_gets_ids_of_their_own(demo, chat, tmp_path):
    """As sessions numbered the calls of every turn before."""
    asked, sunny = {"role": "user", "content": "?"}, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    made = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "oslo"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [made]}
    messages = [asked, called, sunny, {"role": "assistant", "content": "Sun."}, asked, called]
    conversation = {"system": None, "thinking": False, "messages": messages}
    write_session(tmp_path / "chat", demo[0], conversation, demo[0].make_cache())
    chat.restore(tmp_path / "chat")
    assert [call.id for call in chat.tool_calls] == ["call_2"]
    assert chat.messages[1] == called and chat.messages[2] == sunny and chat.messages[:1] == [asked]
    collect(chat.send_tool_results(["rain"]))
    assert chat.messages[6] == {"role": "tool", "tool_call_id": "call_2", "content": "rain"}


@pytest.fixture(scope="module")
def saved_pictures(demo, tmp_path_factory) -> Path:
    """A file of a conversation with two images and a video of two frames."""
    chat = ChatSession(*demo, options=OPTIONS)
    red, wide = Image.new("RGB", (96, 96), "red"), Image.linear_gradient("L").resize((144, 96))
    chat.ask("colors?", images=[red, wide], videos=[[red, wide]])
    path = tmp_path_factory.mktemp("sessions") / "pictures"
    chat.save(path)
    return path


def edited(path: Path, out: Path, change) -> Path:
    """The saved file with `change` made to its JSON and its arrays, and a checksum that fits."""
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    content = json.loads(metadata["content"])
    metadata["content"] = json.dumps(change(content, arrays) or content)
    metadata["sha256"] = session_file._checksum(arrays, metadata["content"])
    mx.save_safetensors(str(out), arrays, metadata)
    return out


def image_says(**said: Any):
    return lambda content, arrays: parts(content)[0]["image"].update(said)


def video_says(**said: Any):
    return lambda content, arrays: parts(content)[2]["video"].update(said)


def part_is(place: int, part: Any):
    return lambda content, arrays: parts(content).__setitem__(place, part)


def array_is(name: str, change):
    return lambda content, arrays: arrays.update({f"images.0.{name}": change(arrays[f"images.0.{name}"])})


def parts(content: list[Any]) -> list[Any]:
    return content[0]["messages"][0]["content"]


def swapped(content: list[Any], arrays: dict[str, mx.array]) -> None:
    for name in ("pixels", "positions"):
        first, second = f"images.0.{name}", f"images.1.{name}"
        arrays[first], arrays[second] = arrays[second], arrays[first]


NAN, SECRET = float("nan"), {"type": "image", "image": "/etc/hostname"}
EDITS = {
    "more soft tokens": image_says(soft_tokens=5),
    "fewer soft tokens": image_says(soft_tokens=3),
    "no soft tokens": image_says(soft_tokens=0),
    "negative soft tokens": image_says(soft_tokens=-4),
    "soft tokens in words": image_says(soft_tokens="4"),
    "soft tokens in a list": image_says(soft_tokens=[4]),
    "half a soft token": image_says(soft_tokens=4.5),
    "another digest": image_says(digest="0" * 64),
    "no digest": image_says(digest=None),
    "another image's arrays": swapped,
    "another image's number": image_says(**{session_file.IMAGE_KEY: 1}),
    "a number that is none": image_says(**{session_file.IMAGE_KEY: 9}),
    "a number that is a name": image_says(**{session_file.IMAGE_KEY: "0.pixels"}),
    "an image without its soft tokens": lambda content, arrays: parts(content)[0]["image"].pop("soft_tokens") and None,
    "patches missing": array_is("pixels", lambda pixels: pixels[:9]),
    "positions missing": array_is("positions", lambda positions: positions[:9]),
    "no patches": lambda content, arrays: arrays.update(
        {"images.0.pixels": mx.zeros((0, 768)), "images.0.positions": mx.zeros((0, 2), dtype=mx.int32)}
    ),
    "wider patches": array_is("pixels", lambda pixels: mx.concatenate([pixels, pixels], axis=1)),
    "patches in a cube": array_is("pixels", lambda pixels: pixels[None]),
    "pixels of another type": array_is("pixels", lambda pixels: pixels.astype(mx.bfloat16)),
    "positions of another type": array_is("positions", lambda positions: positions.astype(mx.int64)),
    "pixels that are no numbers": array_is("pixels", lambda pixels: pixels * NAN),
    "pixels without end": array_is("pixels", lambda pixels: pixels / 0),
    "pixels too bright": array_is("pixels", lambda pixels: pixels + 1),
    "pixels between two colors": array_is("pixels", lambda pixels: pixels * 0.999),
    "another color": array_is("pixels", lambda pixels: 1 - pixels),
    "positions elsewhere": array_is("positions", lambda positions: positions + 1),
    "positions far away": array_is("positions", lambda positions: positions + (2**31 - 8)),
    "positions below": array_is("positions", lambda positions: positions - 13),
    "positions the other way round": array_is("positions", lambda positions: positions[:, ::-1]),
    "positions alike": array_is("positions", lambda positions: positions * 0),
    "a video's times missing": video_says(times=[0.0]),
    "a video's times beyond all": video_says(times=[0.0, float("inf")]),
    "a video's times no numbers": video_says(times=[0.0, NAN]),
    "a video's times before it": video_says(times=[-1.0, 0.0]),
    "a video's times in words": video_says(times="ab"),
    "a video without times": video_says(times=None),
    "a video without frames": video_says(**{session_file.VIDEO_KEY: [], "times": []}),
    "a video of words": video_says(**{session_file.VIDEO_KEY: ["a", "b"]}),
    "a video in a video": lambda content, arrays: parts(content)[2]["video"][session_file.VIDEO_KEY].__setitem__(
        0, {session_file.VIDEO_KEY: [], "times": []}
    ),
    "an image for a video": lambda content, arrays: parts(content)[2].update(video=parts(content)[0]["image"]),
    "a video for an image": lambda content, arrays: parts(content)[0].update(image=parts(content)[2]["video"]),
    "a path for an image": part_is(0, SECRET),
    "a path for a video": part_is(2, {"type": "video", "video": ["/etc/hostname"]}),
    "an image to be filled in": part_is(0, {"type": "image"}),
    "a part that is text": part_is(0, "hello"),
    "messages that are text": lambda content, arrays: content[0].update(messages=["hello"]),
    "one message": lambda content, arrays: content[0].update(messages=content[0]["messages"][0]),
    "no messages at all": lambda content, arrays: content[0].pop("messages") and None,
    "a list for a conversation": lambda content, arrays: [[], content[1]],
    "labels that are none": lambda content, arrays: [content[0], [None for _ in content[1]]],
    "labels that are text": lambda content, arrays: [content[0], "a" * len(content[1])],
    "labels missing": lambda content, arrays: [content[0], content[1][:-1]],
    "nothing": lambda content, arrays: [None],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("edit", EDITS)
def test_a_file_edited_by_hand_is_refused(chat, saved_pictures, tmp_path, edit):
    chat.ask("sort 97")
    before = chat.messages
    path = edited(saved_pictures, tmp_path / "edited.safetensors", EDITS[edit])
    with pytest.raises(CheckpointError, match="does not hold a session of this model") as caught:
        chat.restore(path)
    assert "\n" not in str(caught.value) and chat.messages == before


def test_a_file_edited_to_no_effect_is_restored(chat, saved_pictures, tmp_path):
    """So that it is not the editing that the test above sees refused."""
    chat.restore(edited(saved_pictures, tmp_path / "edited.safetensors", lambda content, arrays: None))
    first, second, video, _ = chat.messages[0]["content"]
    assert [frame.digest for frame in video["video"].frames] == [first["image"].digest, second["image"].digest]
    assert chat.ask("sort 97").finish_reason in ("stop", "tool")


def test_what_only_looks_like_an_image_stays_what_it_is(demo, chat, tmp_path):
    """A tool's answer, and a call's arguments, can hold anything: also what stands for an image in the file."""
    fake = {session_file.IMAGE_KEY: 0, "soft_tokens": 1, "digest": "x", session_file.VIDEO_KEY: [], "times": []}
    made = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"x": fake}}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": fake},
        {"role": "assistant", "content": "ok"},
    ]
    conversation = {"system": None, "thinking": False, "messages": messages}
    write_session(tmp_path / "chat", demo[0], conversation, demo[0].make_cache())
    chat.restore(tmp_path / "chat")
    assert chat.messages == messages
