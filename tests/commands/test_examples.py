"""The examples run, are short, and do what they say, on the demo checkpoint."""

import io
import json
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_diffusiongemma import load
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


def test_the_app_answers_on_a_thread_and_stops(demo_float32):
    worker = runpy.run_path(str(EXAMPLES / "menu_bar_app.py"))["Worker"](*load(demo_float32))
    worker.stop()  # nothing runs yet
    worker.ask("reverse abc")
    worker.thread.join()
    assert worker.text == "cba"
    worker.ask("count from 17")
    while worker.thread.is_alive() and not worker.text:
        time.sleep(0.01)
    worker.stop()
    assert not worker.thread.is_alive() and worker.cancel.is_set()


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


def test_every_example_is_short_and_public():
    tested = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".swift"):
            source = path.read_text()
            assert len(source.splitlines()) <= 40, path
            assert path.stem in tested and "mlx_diffusiongemma." not in source
