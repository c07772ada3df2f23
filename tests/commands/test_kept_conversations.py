"""Conversations that are kept: by `generate` and `chat`, gone on with by -c, listed, shown and removed by `logs`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_diffusiongemma import ChatSession, PromptError, load
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.commands.keeping import conversations
from mlx_diffusiongemma.commands.keeping.conversations import Keeper, directory, kept, read

PICTURE = Path(__file__).parents[1] / "data" / "tiny" / "eval" / "images" / "002.png"
USER, ASSISTANT = {"role": "user", "content": "sort 312"}, {"role": "assistant", "content": "123"}


def run(*arguments: object, text_in: str = ""):
    return CliRunner().invoke(app, list(map(str, arguments)), input=text_in)


def written() -> list[dict]:
    return [json.loads(path.read_text()) for path in kept()]


@pytest.fixture
def ask(demo_float32):
    """Runs a verb on the demo checkpoint, with few steps."""

    def ask(verb: str, *arguments: object, text_in: str = ""):
        return run(verb, *arguments, "--seed", 0, "--steps", 6, "--model", demo_float32, text_in=text_in)

    return ask


@pytest.fixture
def place() -> Path:
    """The directory of conversations, when the first one was kept long ago."""
    directory().mkdir(parents=True)
    return directory()


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


class Held:
    """A session as far as a keeper looks at it."""

    def __init__(self, *messages: dict):
        self.messages, self.thinking, self.tool_calls = list(messages), False, []


def test_what_generate_answered_goes_on_in_generate_and_in_chat(ask, demo_float32):
    first = ask("generate", "sort 53142")
    assert first.stdout == "12345\n" and "`mlx-dg logs off` ends that" in first.stderr
    more = ask("generate", "-c", "reverse canvas")
    assert (
        more.stdout == "savnac\n"
        and "logs off" not in more.stderr
        and "Going on with " in more.stderr
        and "sort 53142" in more.stderr
    )
    chat = ask("chat", "--continue", text_in="sort 312\n/undo\nsort 4231\n")
    assert "> sort 53142\n12345\n> reverse canvas\nsavnac\n2 turns loaded.\n" in chat.stderr
    (conversation,) = written()
    assert [message["content"] for message in conversation["messages"]] == (
        ["sort 53142", "12345", "reverse canvas", "savnac", "sort 4231", chat.stdout.splitlines()[-1]]
    )
    assert conversation["model"] == str(demo_float32)
    assert (kept()[0].stat().st_mode & 0o777, directory().stat().st_mode & 0o777) == (0o600, 0o700)
    # Without --model, it goes on with the model that it was held with.
    assert run("generate", "-c", "sort 312", "--seed", 0, "--steps", 6).exit_code == 0
    assert len(written()) == 1 and len(written()[0]["messages"]) == 8


def test_events_are_kept_too_and_what_is_no_conversation_is_not(ask, tmp_path):
    ask("generate", "sort 53142", "--system", "Be brief.", "--json")
    assert [message["role"] for message in written()[0]["messages"]] == ["system", "user", "assistant"]
    ask("generate", "-c", "sort 53142", "--system", "Be long.")
    assert [message["content"] for message in written()[0]["messages"]][::2] == ["Be long.", "12345", "12345"]
    ask("generate", "sort 53142", "--raw")
    ask("chat", text_in="sort 312\n/undo\n")
    assert len(written()) == 1
    ask("chat", text_in="sort 312\n/reset\nsort 312\n")
    assert len(written()) == 3
    assert run("generate", "x", "--raw", "-c").exit_code == 2


def test_off_with_one_switch_or_the_environment(ask, monkeypatch):
    assert "no longer kept" in run("logs", "off").stderr
    ask("generate", "sort 53142")
    assert kept() == [] and "None is kept at present" in run("logs").stderr
    monkeypatch.setenv("MLX_DG_LOGS", "off")
    assert "MLX_DG_LOGS is off" in " ".join(run("logs", "on").stderr.split())
    ask("generate", "sort 53142")
    assert kept() == []
    monkeypatch.delenv("MLX_DG_LOGS")
    ask("generate", "sort 53142")
    assert len(kept()) == 1


def test_pictures_are_kept_as_their_paths(ask, tmp_path):
    picture = Path(shutil.copy(PICTURE, tmp_path / "seen.png"))
    first = ask("generate", "what?", "--image", os.path.relpath(picture))
    assert first.exit_code == 0, first.stderr
    assert written()[0]["messages"][0]["content"][0] == {"type": "image", "image": str(picture)}
    assert ask("generate", "-c", "sort 312").exit_code == 0
    assert written()[0]["messages"][0]["content"][0] == {"type": "image", "image": str(picture)}
    assert "(image) what?" in run("logs", "show").stdout
    picture.unlink()
    gone = ask("generate", "-c", "sort 312")
    assert gone.exit_code == 1 and str(picture) in gone.stderr and len(written()[0]["messages"]) == 4


def test_the_oldest_make_room(place, monkeypatch):
    monkeypatch.setattr(conversations, "MOST", 2)
    for number in range(4):
        Keeper(Held({"role": "user", "content": f"number {number}"}, ASSISTANT), "a/model", pytest.fail).keep()
        os.utime(kept()[0], (number, number))
    assert [content["messages"][0]["content"] for content in written()] == ["number 3", "number 2"]
    monkeypatch.setattr(conversations, "MOST_BYTES", 1)
    Keeper(Held(USER, ASSISTANT), "a/model", pytest.fail).keep()
    assert [content["messages"][0]["content"] for content in written()] == ["sort 312"]


def test_two_that_go_on_with_one_conversation_lose_neither(place, demo):
    Keeper(Held(USER, ASSISTANT), "a/model", pytest.fail).keep()
    sessions = [ChatSession(*demo), ChatSession(*demo)]
    keepers = [Keeper(session, "a/model", pytest.fail) for session in sessions]
    for keeper in keepers:
        keeper.resume(read(kept()[0]))
    for session, keeper, word in zip(sessions, keepers, ("one", "two"), strict=True):
        session.resume([*session.messages, {"role": "user", "content": word}, ASSISTANT])
        keeper.keep()
    assert sorted(content["messages"][2]["content"] for content in written()) == ["one", "two"]


def test_a_disk_that_cannot_be_written_is_no_error(ask, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    done = ask("generate", "sort 53142")
    assert (done.exit_code, done.stdout) == (0, "12345\n") and "conversation cannot be kept" in done.stderr


def test_calls_without_results_are_not_kept(place, demo):
    session = Held(USER, ASSISTANT)
    session.tool_calls = ["a call"]
    Keeper(session, "a/model", pytest.fail).keep()
    assert kept() == []


def test_they_are_listed_shown_and_removed(place):
    assert run("logs").stderr.startswith("0 of 0 conversations") and run("logs", "show").exit_code == 1
    for number in range(3):
        asked = {"role": "user", "content": f"number\n\x1b[2J {number}"}
        Keeper(Held({"role": "system", "content": "Be brief."}, asked, ASSISTANT), "a/model", pytest.fail).keep()
        os.utime(kept()[0], (number, number))
    names = [path.stem for path in kept()]
    listed = run("logs", "-n", 2)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == names[:2]
    assert "1 turn" in listed.stdout and "\x1b" not in listed.stdout and "2 of 3" in listed.stderr
    assert run("logs", "show").stdout == "Be brief.\n> number\n␛[2J 2\n123\n"
    assert json.loads(run("logs", "show", names[1], "--json").stdout)["messages"][1]["content"].endswith("1")
    assert "3 conversations are called 2" in run("logs", "show", "2").stderr
    assert run("logs", "path").stdout.strip() == str(directory())
    assert run("logs", "remove", names[0]).exit_code == 2  # nobody can be asked
    assert run("logs", "remove").exit_code == 2 and run("logs", "remove", "").exit_code == 2 and len(kept()) == 3
    assert run("logs", "remove", names[0], "--yes").exit_code == 0 and [path.stem for path in kept()] == names[1:]
    assert run("logs", "remove", "--all", "-y").stderr == "Deleted 2 conversations.\n" and kept() == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": "a", "thinking": false, "messages": [{"role": 1}]}'])
def test_a_damaged_file_is_said_to_be_one(place, content):
    (place / "20260101-000000-abcd.json").write_text(content)
    assert "(damaged)" in run("logs").stdout
    for arguments in (["logs", "show"], ["generate", "-c", "x"], ["chat", "-c"]):
        done = run(*arguments)
        assert done.exit_code == 1 and "logs remove 20260101-000000-abcd" in " ".join(done.stderr.split())


def test_a_session_goes_on_with_messages(demo):
    session = ChatSession(*demo, system="Be brief.")
    session.resume([USER, ASSISTANT])
    assert session.messages == [USER, ASSISTANT] and session.system is None
    assert session.ask("sort 4231").stats.cached_tokens == 0
    other = ChatSession(*demo)
    other.resume([{"role": "system", "content": "Be brief."}, *session.messages])
    assert other.system == "Be brief." and other.messages[1:] == session.messages
    with pytest.raises(PromptError):
        other.resume([{"role": "nobody", "content": "x"}])
    assert other.system == "Be brief."
