"""Videos: frames in the prompt as Gemma's processor words them, in a conversation, and from the command line."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from templates import DEMO, demo_processor

from mlx_diffusiongemma import ChatSession, GenerationOptions, ModelConfig, Processor, PromptError, generate, load
from mlx_diffusiongemma.processing.images import PreparedVideo, prepare_image

COLORS = ("red", "green", "blue", "white")
OPTIONS = GenerationOptions(seed=0, max_tokens=128, max_steps=8)


@pytest.fixture(scope="module")
def processor():
    return demo_processor()


def still(color: str) -> Image.Image:
    return Image.new("RGB", (96, 48), color)


def gif(*colors: str, seconds: float = 1.0) -> bytes:
    first, *rest = map(still, colors)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=int(1000 * seconds))
    return buffer.getvalue()


def digest(color: str, budget: int = 70) -> str:
    return prepare_image(still(color), budget=budget).digest


def user(*parts: dict | str) -> dict:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def video(source: object, **settings: object) -> dict:
    return {"type": "video", "video": source, **settings}


def room(color: str) -> str:
    return f"<|image>{'<|image|>' * prepare_image(still(color), budget=70).soft_tokens}<image|>"


RED_BLUE = f"00:00 {room('red')} 00:01 {room('blue')}"


def test_a_video_is_its_frames_and_their_times(processor):
    prompt = processor.prompt([user(" look: ", video(gif("red", "blue")), "\nwhat is it?")])
    assert prompt.text == f"<bos><|turn>user\nlook:{RED_BLUE}what is it?<turn|>\n<|turn>model\n"
    assert [image.digest for image in prompt.images] == [digest("red"), digest("blue")]
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image|>")
    assert prompt.tokens.count(image_token) == sum(image.soft_tokens for image in prompt.images)


def test_every_spelling_and_source_gives_the_same_prompt(processor, tmp_path):
    content = gif("red", "blue")
    (tmp_path / "a.gif").write_bytes(content)
    still("red").save(tmp_path / "red.png")
    path = str(tmp_path / "a.gif")
    encoded = base64.b64encode(content).decode()
    url = f"data:image/gif;base64,{encoded}"
    parts = [
        video(tmp_path / "a.gif"),
        {"type": "video", "path": path},
        {"type": "video", "url": url},
        {"type": "video", "base64": encoded},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video_url", "video_url": path},
        video(Image.open(io.BytesIO(content))),
        video([tmp_path / "red.png", still("blue")], fps=1),
        video((str(tmp_path / "red.png"), still("blue")), fps=1),
        video(processor.prepare_video(path)),
    ]
    expected = processor.prompt([user(video(content), "?")])
    for part in parts:
        prompt = processor.prompt([user(part, "?")])
        assert prompt.tokens == expected.tokens
        assert [image.digest for image in prompt.images] == [image.digest for image in expected.images]


def test_frames_and_images_stay_in_order(processor):
    messages = [
        user({"type": "image"}, video([still("red"), still("green")]), {"type": "image", "image": still("blue")}, "a"),
        {"role": "assistant", "content": "b"},
        user("c", video(gif("white")), {"type": "image"}, video(gif("blue", "red"))),
    ]
    prompt = processor.prompt(messages, images=[still("white"), still("green")])
    order = ["white", "red", "green", "blue", "white", "green", "blue", "red"]
    assert [image.digest for image in prompt.images] == [digest(color) for color in order]
    assert prompt.text.count("<|image>") == len(order)
    with pytest.raises(PromptError, match="Image parts to fill: 2, images given: 3"):
        processor.prompt(messages, images=[still("white")] * 3)


def test_a_tools_video_follows_its_answer(processor):
    call = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {}}]}
    answer = {"role": "tool", "content": [{"type": "text", "text": "see"}, video(gif("red", "blue"))]}
    prompt = processor.prompt([user("?"), call, answer])
    assert prompt.text.endswith(f'response:look{{value:<|"|>see<|"|>}}<tool_response|>{RED_BLUE}')


def test_how_many_frames_and_how_fast(processor):
    frames = [still(color) for color in COLORS]
    prompt = processor.prompt([user(video(frames, frames=2, fps=0.5), "?")])
    assert [image.digest for image in prompt.images] == [digest("red"), digest("blue")]
    assert "00:00 <" in prompt.text and "00:04 <" in prompt.text
    assert len(processor.prompt([user(video(frames * 20), "?")]).images) == 32


def test_frames_have_a_budget_of_their_own(processor):
    large = Image.new("RGB", (960, 960))
    messages = [user({"type": "image"}, video(large))]
    image, frame = processor.prompt(messages, images=[large], image_budget=280).images
    assert (image.soft_tokens, frame.soft_tokens) == (256, 64)


REFUSED = {
    "no source": ([user({"type": "video"})], "without its video"),
    "no url": ([user({"type": "video_url", "video_url": {}})], "without its video"),
    "an assistant's video": ([{"role": "assistant", "content": [video(gif("red"))]}], "only user and tool messages"),
    "a file that is none": ([user(video(b"nothing"))], "not a video in a known format"),
    "a missing file": ([user(video("/nowhere.gif"))], "/nowhere.gif"),
    "on the network": ([user(video("https://example.com/a.gif"))], "allow_urls"),
    "no frames": ([user(video([]))], "no frames"),
    "a number": ([user(video(3))], "not a int"),
    "frames that are none": ([user(video([still("red"), 3]))], "not a int"),
    "no number of frames": ([user(video(gif("red"), frames="all"))], "whole number of frames"),
    "no speed": ([user(video(gif("red"), fps=[2]))], "frames per second"),
    "a place holder in the text": ([user("<|image|>", video(gif("red")))], "2 places"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_said_in_one_sentence(processor, case):
    messages, words = case
    with pytest.raises(PromptError) as error:
        processor.prompt(messages)
    sentence = str(error.value)
    assert words in sentence and "\n" not in sentence and sentence.endswith(".")


def test_a_checkpoint_that_cannot_see():
    blind = Processor.from_directory(DEMO, replace(ModelConfig.from_directory(DEMO), vision=None))
    for ask in (
        lambda: blind.prompt([user(video(gif("red")))]),
        lambda: blind.content("x", videos=[gif("red")]),
        lambda: blind.prepare_video(gif("red")),
    ):
        with pytest.raises(PromptError, match="cannot see images"):
            ask()
    assert blind.content("x") == "x"


def test_content_takes_lists(processor):
    for given in ({"images": "a.png"}, {"videos": "a.gif"}, {"videos": b"GIF"}, {"videos": None}):
        with pytest.raises(PromptError, match="takes a list"):
            processor.content("x", **given)


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


@pytest.fixture
def chat(demo):
    return ChatSession(*demo, options=OPTIONS)


def test_a_conversation_keeps_videos_as_they_were_prepared(chat, demo, tmp_path):
    path = tmp_path / "a.gif"
    path.write_bytes(gif("red", "blue"))
    slow = chat.processor.prepare_video([still("green"), still("red")], fps=0.5)
    first = chat.ask("colors?", images=[still("white")], videos=[str(path), slow])
    path.unlink()
    image, kept, same, _ = chat.messages[0]["content"]
    assert image["type"] == "image" and same["video"] is slow
    assert isinstance(kept["video"], PreparedVideo) and kept["video"].times == (0, 1)
    chat.save(tmp_path / "chat")
    history = chat.messages
    expected = generate(*demo, [*history, {"role": "user", "content": "sort 97"}], options=OPTIONS)
    assert "00:01 <" in chat.processor.prompt(history).text
    restored = ChatSession(*demo, options=OPTIONS)
    restored.restore(tmp_path / "chat")
    assert restored.messages[0]["content"][1]["video"].times == (0, 1)
    for session in (chat, restored):
        again = session.ask("sort 97")
        assert again.tokens == expected.tokens
        assert again.stats.cached_tokens >= first.stats.prompt_tokens - 6  # all but the end of the first prompt


def test_a_bad_video_leaves_the_session_as_it_was(chat):
    chat.ask("sort 53142")
    before = chat.messages
    for videos in (["/nowhere.gif"], [b"nothing"], [[]], "a.gif"):
        with pytest.raises(PromptError):
            chat.send("colors?", videos=videos)
    assert chat.messages == before and chat.ask("sort 97").finish_reason == "stop"


def run(verb: str, checkpoint: Path, *arguments: object, typed: str = "") -> subprocess.CompletedProcess:
    command = str(Path(sys.executable).with_name("mlx-dg"))
    return subprocess.run(
        [command, verb, "--model", str(checkpoint), "--seed", "0", *map(str, arguments)],
        input=typed,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )


def test_the_commands_take_videos(demo_float32, tmp_path):
    (tmp_path / "a.gif").write_bytes(gif("red", "blue"))
    (tmp_path / "b.gif").write_bytes(b"nothing")
    still("red").save(tmp_path / "c.png")
    given = ["--video", tmp_path / "a.gif", "--image", tmp_path / "c.png", "--video", tmp_path / "a.gif"]
    done = run("generate", demo_float32, *given, "colors?")
    assert (done.returncode, done.stdout != "") == (0, True), done.stderr
    done = run("generate", demo_float32, "--video", tmp_path / "b.gif", "colors?")
    assert (done.returncode, done.stdout) == (1, "") and "b.gif is not a video" in done.stderr
    lines = [f"/video '{tmp_path}/a.gif'", f"/video {tmp_path}/c.png", "colors?", "/video", "/video /nowhere.gif"]
    done = run("chat", demo_float32, typed="\n".join(lines) + "\n")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "2 frames, the last at 00:01, for your next message\n1 frame, the last at 00:00" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("mlx-dg: ")]) == 2
