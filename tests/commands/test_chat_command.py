"""`mlx-dg chat`: piped, at a terminal, and with tools."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_diffusiongemma import ChatSession, GenerationOptions, PromptError, ToolCall, load
from mlx_diffusiongemma.commands.chatting import chat as chat_command
from mlx_diffusiongemma.commands.chatting import turns as turns_module
from mlx_diffusiongemma.commands.chatting.tools import Failure, load_functions, run_call, written
from mlx_diffusiongemma.commands.keeping.conversations import Keeper
from mlx_diffusiongemma.commands.keeping.shown import MOST_SHOWN, shortened
from mlx_diffusiongemma.events import Done, Stats
from mlx_diffusiongemma.paths import data_directory

COMMAND = [str(Path(sys.executable).with_name("mlx-dg")), "chat"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
TOOLS = '''
from math import sqrt

def get_weather(city: str) -> str:
    """Get weather

    Args:
        city: City
    """
    if city == "atlantis":
        raise LookupError("no such city")
    return "sunny"

def _private():
    """Not a tool."""
'''


def piped(lines: list[str], checkpoint: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, "--model", str(checkpoint), "--seed", "0", "--steps", "6", *arguments],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=120,
    )


def test_piped_a_line_is_a_turn(demo_float32, tmp_path):
    kept = tmp_path / "a chat"
    done = piped(["sort 53142", "", f"/save '{kept}'", "reverse canvas", "/undo", "//undo", "/quit", "x"], demo_float32)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12345\nsavnac\n") and len(done.stdout) > len("12345\nsavnac\n")
    assert "\x1b" not in done.stdout + done.stderr
    assert "Saved." in done.stderr and "The last turn is forgotten." in done.stderr
    assert "cached)" in done.stderr and kept.exists()
    done = piped([f"/load {kept}", "/undo"], demo_float32)
    assert (done.returncode, done.stdout) == (0, "") and "1 turn loaded." in done.stderr
    assert "> sort 53142\n12345\n" in done.stderr  # the conversation is shown


def test_piped_errors_are_one_sentence_and_the_chat_goes_on(demo_float32, tmp_path):
    (tmp_path / "damaged").write_bytes(b"nothing")
    lines = ["/nope", "/image /nowhere.png", "/image", f"/load {tmp_path}/damaged", "/undo", "/undo 2", "/help"]
    lines += [f"/save {tmp_path}/damaged/x", "/save a\0b", f"/load {'x' * 300}", "/image data:,x", "sort 53142"]
    done = piped(lines, demo_float32)
    assert (done.returncode, done.stdout) == (1, "12345\n")
    wrong = [line for line in done.stderr.splitlines() if line.startswith("mlx-dg: ") and " are kept in " not in line]
    assert len(wrong) == 10 and "Traceback" not in done.stderr
    assert "/image PATH" in done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [("def f(a): pass", "cannot be described"), ("import sys; sys.exit(3)", "cannot be run"), ("x = 1", "no public")],
)
def test_tools_that_cannot_be_are_refused_at_the_start(demo_float32, tmp_path, code, words):
    (tmp_path / "tools.py").write_text(code)
    done = piped(["sort 53142"], demo_float32, "--tools", str(tmp_path / "tools.py"))
    assert (done.returncode, done.stdout) == (1, "") and words in done.stderr and "Traceback" not in done.stderr


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *command: str):
        self.process, self.master = pty.fork()
        if self.process == 0:
            os.execvpe(command[0], list(command), {**os.environ, **ENVIRONMENT, "TERM": "xterm-256color"})
        termios.tcsetwinsize(self.master, (24, 80))
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until `text` comes; what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self) -> int:
        status = os.waitpid(self.process, 0)[1]
        os.close(self.master)
        return os.waitstatus_to_exitcode(status)


WITHOUT_TOOLKIT = "import sys; sys.modules['prompt_toolkit'] = None; from mlx_diffusiongemma.cli import main; main()"


@pytest.mark.parametrize("toolkit", [True, False])
def test_a_terminal_has_history_and_ctrl_c_stops_a_reply(demo_float32, toolkit):
    program = COMMAND if toolkit else [sys.executable, "-c", WITHOUT_TOOLKIT, "chat"]
    ready = "\x1b[?2004h" if toolkit else "> "  # the toolkit draws its prompt piece by piece
    terminal = Terminal(*program, "--model", str(demo_float32), "--seed", "0", "--steps", "6")
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for(ready)
    terminal.type("sort 53142\r")
    terminal.wait_for("12345")
    terminal.wait_for(ready)
    terminal.type("solve " + "1234567890 " * 200 + "\r")
    terminal.wait_for("prompt 26/")
    terminal.type("\x03")
    assert "0 tokens" not in terminal.wait_for("this turn is forgotten")
    terminal.wait_for(ready)
    terminal.type("\x1b[A\x1b[A\r")  # two up
    terminal.wait_for("5 tokens")
    terminal.wait_for(ready)
    terminal.type("\x04")
    assert terminal.close() == 0
    kept = (data_directory() / "chat-history").read_text()
    assert "sort 53142" in kept and (data_directory() / "chat-history").stat().st_mode & 0o077 == 0
    again = Terminal(*program, "--model", str(demo_float32), "--seed", "0", "--steps", "6")
    again.wait_for("Ctrl-D leaves")
    again.wait_for(ready)
    again.type("\x1b[A\r")  # what an earlier run was asked
    again.wait_for("5 tokens")
    again.wait_for(ready)
    again.type("/bye\r")
    assert again.close() == 0


def test_ctrl_z_suspends_and_tab_completes(demo_float32, tmp_path):
    (tmp_path / "kept").mkdir()
    terminal = Terminal("bash", "--norc", "-i")  # only what a shell has started can be suspended
    terminal.type("PS1=the-'shell> '\r")
    terminal.type(f"{' '.join(COMMAND)} --model {demo_float32} --no-history\r")
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("\x1b[?2004h")
    terminal.type("\x1a")
    terminal.wait_for("Stopped")
    terminal.type("fg\r")
    terminal.wait_for("--no-history")
    terminal.wait_for("\x1b[?2004h")
    terminal.type("/he\t\r")
    terminal.wait_for("/image PATH")
    terminal.wait_for("\x1b[?2004h")
    terminal.type(f"/load {tmp_path}/ke\t\r")
    terminal.wait_for("There is no file")
    terminal.wait_for("\x1b[?2004h")
    terminal.type("\x04")
    terminal.wait_for("\x1b[?2004l")
    terminal.wait_for("the-shell> ")
    terminal.type("exit 0\r")
    assert terminal.close() == 0
    assert not (data_directory() / "chat-history").exists()


def test_settings_change_between_turns(demo_float32):
    lines = ["/set steps 3", "/set", "/set steps default", "/set steps", "/set mode fast", "/set steps", "/set heat on"]
    lines += ["/set mode turbo", "/decoder ar", "/set mode fast", "/decoder diffusion"]
    lines += [
        "/set mode reference",
        "/set steps 0",
        "/set speed 2",
        "/set temp 1",
        "/set heat 7",
        "/set mode",
        "/set stop 3",
        "sort 53142",
    ]
    done = piped(lines, demo_float32)
    said = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "12\n"
    assert said[:3] == ["steps: 3", "decoder: diffusion", "max-tokens: 1024"] and "steps: 48 [the checkpoint's]" in said
    assert "mode: fast" in said and "steps: 24" in said and "heat: on" in said and "stop: '3'" in said
    assert "mode: turbo" in said
    wrong = [line.removeprefix("mlx-dg: ") for line in said if line.startswith("mlx-dg: ")]
    assert "is about denoising" in wrong.pop(0)
    assert wrong[0] == "/set steps: 0 is not a whole number of at least 1."
    assert (
        "There is no setting speed; they are decoder, mode, max-tokens" in wrong[1] and "/set entropy-bound" in wrong[2]
    )
    assert wrong[3:5] == ["/set heat takes on or off, not 7.", "/set mode needs a name: /set mode fast"]


def test_replies_are_valid_for_a_schema_while_there_is_one(demo_float32, tmp_path):
    person = {"type": "object", "properties": {"name": {"enum": ["bob"]}, "age": {"enum": [11, 12]}}}
    person["required"] = ["name", "age"]
    schema, day, wrong = tmp_path / "person.json", tmp_path / "a day.json", tmp_path / "wrong.json"
    schema.write_text(json.dumps(person))
    day.write_text('{"enum": ["mo", "tu"]}')
    wrong.write_text('{"not": {}}')
    (tmp_path / "null.json").write_text("null")
    lines = ["sort 53142", f'/schema "{day}"', "sort 53142", "/schema", f"/schema {wrong}", "/schema"]
    lines += [f"/schema {tmp_path / 'null.json'}", f"/schema {tmp_path / 'none'}", "/schema off", "sort 53142"]
    done = piped(lines, demo_float32, "--schema", str(schema))
    first, second, third = done.stdout.splitlines()
    assert json.loads(first)["name"] == "bob" and json.loads(first)["age"] in (11, 12)
    assert json.loads(second) in ("mo", "tu") and third == "12345" and done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith(("schema: ", "mlx-dg: "))]
    assert "Conversations are kept" in said.pop(0)
    assert said[:2] == [f"schema: {day}"] * 2 and "`not` of `schema` cannot be honoured" in said[2]
    assert said[3] == f"schema: {day}" and "holds no JSON object" in said[4] and "cannot be read" in said[5]
    assert said[6] == "schema: off"


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ('{"uniqueItems": true}', "`uniqueItems`")])
def test_a_schema_that_cannot_be_used_is_refused_before_the_first_turn(demo_float32, tmp_path, text, words):
    (tmp_path / "schema.json").write_text(text)
    done = piped(["sort 53142"], demo_float32, "--schema", str(tmp_path / "schema.json"))
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_generate_runs_tools_as_chat_does(demo_float32, tmp_path):
    (tmp_path / "tools.py").write_text(TOOLS)
    arguments = ["how is lima today?", "--model", str(demo_float32), "--seed", "0", "--steps", "8", "--tools"]
    command = [COMMAND[0], "generate", *arguments, str(tmp_path / "tools.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0 and 'get_weather(city="lima") was not run' in done.stderr
    assert not done.stdout.startswith("\n")
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    *_, commit, last = map(json.loads, done.stdout.splitlines())
    assert "get_weather" in str(commit["parts"]) and last["finish_reason"] == "tool"


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(TOOLS)
    return load_functions(path)


def talk(demo, functions, monkeypatch, answer, terminal=True):
    """A chat at a terminal whose user answers every question with `answer`."""

    def read(question: str) -> str:
        asked.append(question)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    asked: list[str] = []
    for module in (chat_command, turns_module):
        monkeypatch.setattr(module, "at_terminal", lambda: terminal)
    monkeypatch.setattr(turns_module, "answer_reader", lambda: read)
    options = GenerationOptions(seed=0, max_tokens=64, max_steps=8)
    session = ChatSession(*demo, tools=list(functions.values()), options=options)
    lines = iter(["how is lima today?"])

    def next_line(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat_command._Chat(session, functions, Keeper(session, "a-model", lambda sentence: None), live=False).run(next_line)
    return session, asked


def test_a_tool_runs_when_the_user_says_yes(demo, functions, monkeypatch, capsys):
    session, asked = talk(demo, functions, monkeypatch, " Y ")
    assert asked == ['Run get_weather(city="lima")? [y/N] ']
    assert [message["role"] for message in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert session.messages[2]["content"] == "sunny"
    written = capsys.readouterr()
    assert written.out == "lima: sunny\n" and "get_weather gave sunny\n" in written.err


def test_a_tool_that_fails_is_seen(demo, functions, monkeypatch, capsys):
    @wraps(functions["get_weather"])
    def get_weather(city: str) -> str:
        raise LookupError(f"no such city\x1b[2J as {city}")

    session, _ = talk(demo, functions | {"get_weather": get_weather}, monkeypatch, "y")
    assert session.messages[2]["content"] == {"error": "LookupError: no such city\x1b[2J as lima"}
    said = capsys.readouterr().err
    assert "get_weather failed: LookupError: no such city" in said and "\x1b[2J" not in said


def test_ctrl_c_in_a_tool_ends_the_turn(demo, functions, monkeypatch, capsys):
    @wraps(functions["get_weather"])
    def get_weather(city: str) -> str:
        raise KeyboardInterrupt

    session, _ = talk(demo, functions | {"get_weather": get_weather}, monkeypatch, "y")
    assert session.messages == [] and "Stopped; this turn is forgotten." in capsys.readouterr().err


def test_what_a_tool_gives_is_shown_in_one_line():
    assert shortened({"a": [1, "ü"]}) == '{"a": [1, "ü"]}' and shortened("a\n b") == "a b"
    assert shortened({1, 2}) == "{1, 2}"
    assert len(shortened("x" * 10_000)) < MOST_SHOWN + 30 and "10,000" in shortened("x" * 10_000)


@pytest.mark.parametrize("answer", ["", EOFError()])
def test_a_tool_does_not_run_otherwise(demo, functions, monkeypatch, answer):
    session, _ = talk(demo, {"get_weather": functions["get_weather"]}, monkeypatch, answer)
    assert session.messages[2]["content"] == {"error": "the user did not allow this call"}


def test_ctrl_c_at_the_question_forgets_the_turn(demo, functions, monkeypatch, capsys):
    session, _ = talk(demo, functions, monkeypatch, KeyboardInterrupt())
    assert session.messages == [] and "Stopped; this turn is forgotten." in capsys.readouterr().err


def test_piped_no_tool_runs(demo, functions, monkeypatch, capsys):
    session, asked = talk(demo, functions, monkeypatch, "y", terminal=False)
    assert asked == [] and "not allow" in session.messages[2]["content"]["error"]
    assert 'get_weather(city="lima") was not run' in capsys.readouterr().err


class Calling:
    """A session whose every reply calls a tool, with an argument that would clear the screen."""

    model = processor = SimpleNamespace(options=GenerationOptions(), draft_text=str)
    options = GenerationOptions()

    def __init__(self):
        self.messages: list[dict[str, str]] = []

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [ToolCall("elsewhere", {"a": "\x1b[2J"}, "call_1")] if self.messages else []

    def send(self, *_, cancel, schema=None):
        self.messages.append({"role": "assistant", "content": ""})
        return iter([Done("tool", Stats())])

    send_tool_results = send

    def undo(self):
        self.messages = []


def test_calls_without_end_are_ended_and_cannot_draw(capsys):
    session, lines = Calling(), iter(["hello", "/quit"])
    chat = chat_command._Chat(session, {}, Keeper(session, "a-model", lambda sentence: None), live=False)
    chat.run(lambda _: next(lines))
    written = capsys.readouterr().err
    assert session.messages == [] and chat.failed
    assert written.count("which is not among the tools") == turns_module.MOST_CALLS
    assert "8 times in a row" in written and "\x1b" not in written


def test_what_a_file_defines_becomes_tools(functions, tmp_path):
    assert list(functions) == ["get_weather"]
    call = ToolCall("get_weather", {"city": "atlantis"})
    with pytest.raises(Failure, match="LookupError: no such city"):
        run_call(functions, call)
    call = ToolCall("get_weather", {"town": "lima"})
    with pytest.raises(Failure, match="TypeError"):
        run_call(functions, call)
    assert written(call) == 'get_weather(town="lima")'
    for name, content, message in (
        ("missing.py", None, "not a Python file"),
        ("tools.txt", TOOLS, "not a Python file"),
        ("broken.py", "def f(:\n", "cannot be run"),
        ("raises.py", "1 / 0\n", "ZeroDivisionError"),
        ("empty.py", "x = 1\n", "defines no public function"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(PromptError, match=message):
            load_functions(tmp_path / name)
