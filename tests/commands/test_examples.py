"""The examples run, are short, and do what they say, on the demo checkpoint."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_diffusiongemma import MemoryWarning
from mlx_diffusiongemma.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGE = Path(__file__).parents[1] / "data" / "tiny" / "eval" / "images" / "002.png"


@pytest.mark.parametrize(
    ("name", "arguments", "typed", "printed"),
    [
        ("generate", ["reverse abc"], "", "cba\n"),
        ("watch_drafts", ["sort 312"], "", "123"),
        ("infill_code", ["abcd", "hij", "reverse jihgfedcba"], "", "abcdefghij\n"),
        ("edit_in_place", ["savxac\n", "x", "reverse canvas"], "", "-savxac\n+savnac\n"),
        ("decide", ["sort 21", "12", "21"], "", "12\n"),
        ("json_form", ["json name=bob age=12"], "", '{\n  "name": "bob",\n  "age": 12\n}\n'),
        ("describe_image", [str(IMAGE), "colors?"], "", "yellow blue\n"),
        ("chat_with_tools", [], "how is lima today?\n\n", "lima: rain\n"),
    ],
)
def test_an_example_runs(demo_float32, monkeypatch, capsys, name, arguments, typed, printed):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(demo_float32), *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert printed in capsys.readouterr().out


def engine(path):
    return runpy.run_path(str(EXAMPLES / "app" / "engine.py"))["Engine"](path)


def test_the_apps_engine_answers_on_a_thread_and_stops(demo_float32):
    app = engine(demo_float32)
    app.stop()  # nothing runs yet
    app.ask("reverse abc").result(60)
    assert (app.text, app.status) == ("cba", "Ready")
    answer = app.ask("count from 17")
    while not answer.done() and not app.text:
        time.sleep(0.001)
    app.stop()
    answer.result(60)
    assert app.status == "Stopped"
    app.worker.shutdown()


def test_the_apps_engine_says_what_went_wrong(tmp_path):
    app = engine(tmp_path)
    app.worker.shutdown()
    assert str(tmp_path) in app.status


def test_the_apps_engine_shows_memory_warnings(demo_float32, monkeypatch):
    from mlx_diffusiongemma.checkpoints import loading

    monkeypatch.setattr(loading, "check_fits", lambda checkpoint: warnings.warn("Tight.", MemoryWarning, stacklevel=2))
    app = engine(demo_float32)
    app.worker.shutdown()
    assert app.status == "Tight."


def test_the_apps_engine_runs_by_itself(demo_float32, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["engine.py", str(demo_float32), "reverse abc"])
    runpy.run_path(str(EXAMPLES / "app" / "engine.py"), run_name="__main__")
    assert capsys.readouterr().out == "cba\n"


def test_the_menu_bar_uses_what_the_engine_has():
    """Its window opens on a Mac only: every attribute of the engine that it names is there."""
    used = set(re.findall(r"engine\.(\w+)", (EXAMPLES / "app" / "menu_bar_app.py").read_text()))
    source = (EXAMPLES / "app" / "engine.py").read_text()
    assert used == {"ask", "stop", "text", "status"} and all(
        f"self.{name}" in source or f"def {name}" in source for name in used
    )


def test_the_swift_example_reads_events_that_exist(demo_float32):
    source = (EXAMPLES / "read_events.swift").read_text()
    arguments = re.search(r'arguments = \["mlx-dg", (.*?), CommandLine', source)[1].replace('"', "").split(", ")
    found = CliRunner().invoke(app, [*arguments, str(demo_float32), "reverse abc"])
    events = [json.loads(line) for line in found.stdout.splitlines()]
    fields = re.findall(r"let (\w+): (\w+)(\??)", source.split("struct Event")[1].split("}")[0])
    swift = {"String": str, "Int": int}
    for event in events:
        for name, kind, optional in fields:
            assert isinstance(event[name], swift[kind]) if name in event else optional
    read = dict(re.findall(r'case "(\w+)": (.*)', source))
    for kind, code in read.items():
        event = next(event for event in events if event["type"] == kind)
        assert set(re.findall(r"event\.(\w+)!", code)) <= set(event)
    assert "".join(event["text"] for event in events if event["type"] == "commit") == "cba"


@pytest.mark.skipif(not shutil.which("swiftc"), reason="no Swift compiler here: swiftc is not on the PATH")
def test_the_swift_example_runs(demo_float32, tmp_path):
    subprocess.run(["swiftc", str(EXAMPLES / "read_events.swift"), "-o", str(tmp_path / "read_events")], check=True)
    command = tmp_path / "mlx-dg"
    command.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c 'from mlx_diffusiongemma.cli import main; main()' \"$@\"\n"
    )
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    read = [str(tmp_path / "read_events")]
    good = subprocess.run([*read, str(demo_float32), "reverse abc"], env=environment, capture_output=True, text=True)
    assert good.returncode == 0 and good.stdout.splitlines()[-2:] == ["cba", "(stop)"]
    assert good.stdout.startswith("step 1/48: ")
    bad = subprocess.run(
        [*read, str(tmp_path / "none"), "reverse abc"], env=environment, capture_output=True, text=True
    )
    assert bad.returncode == 1 and bad.stdout == ""


def test_every_example_is_short_and_public():
    tested = Path(__file__).read_text()
    for path in [*EXAMPLES.glob("*"), *(EXAMPLES / "app").glob("*")]:  # other folders are recipes, of several steps
        if path.suffix in (".py", ".swift"):
            source = path.read_text()
            assert len(source.splitlines()) <= 60, path
            assert path.stem in tested and "mlx_diffusiongemma." not in source
