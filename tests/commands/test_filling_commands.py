"""The verbs `infill` and `edit`, run as a user runs them: what they read, print, write and refuse."""

import json
import os
import signal
import subprocess

import pytest
from test_cli import COMMAND, run

from mlx_diffusiongemma.commands.text_files import line_span
from mlx_diffusiongemma.display.trace import read_trace
from mlx_diffusiongemma.errors import PromptError

HOLES = "reverse abc: <FILL>\nsort 312: <FILL> end\n"
QUICK = ("--seed", 1, "--steps", 2)


@pytest.mark.parametrize(
    ("text", "lines", "meant"),
    [
        ("a\nb\nc\n", "2:3", "b\nc"),
        ("a\nb\nc\n", "2:", "b\nc"),
        ("a\nb\nc", "2:", "b\nc"),
        ("a\nb\nc\n", ":2", "a\nb"),
        ("a\nb\nc\n", "2", "b"),
        ("a\r\nb\r\nc", "1:2", "a\r\nb"),
    ],
)
def test_lines(text, lines, meant):
    start, stop = line_span(text, lines)
    assert text[start:stop] == meant


@pytest.mark.parametrize("lines", ["", ":", "0:2", "2:1", "4:", ":9", "a:b", "1:2:3", "-1", "1-2", "٣"])
def test_no_lines(lines):
    with pytest.raises(PromptError, match="--lines"):
        line_span("a\nb\nc\n", lines)


def test_an_empty_line_is_a_hole_and_nothing_to_edit():
    assert line_span("a\n\nc\n", "2", may_be_empty=True) == (2, 2)
    with pytest.raises(PromptError, match="nothing to edit"):
        line_span("a\n\nc\n", "2")


def test_a_pipe_gets_the_text_and_stderr_what_it_cost(demo_float32):
    done = run("infill", "-", "--tokens", 2, "--model", demo_float32, *QUICK, text_in=HOLES)
    first, second = HOLES.split("<FILL>")[:2]
    assert done.returncode == 0 and done.stdout.startswith(first) and done.stdout.endswith(" end\n")
    assert second in done.stdout and "\x1b" not in done.stdout + done.stderr
    assert "tok/s" in done.stderr and "canvas" in done.stderr


def test_json_and_trace_of_a_text_with_holes(demo_float32, tmp_path):
    trace = tmp_path / "trace"
    done = run("infill", "-", "--tokens", 2, "--json", "--trace", trace, "--model", demo_float32, *QUICK, text_in=HOLES)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "prefill" and kinds[-1] == "done" and "draft" in kinds
    filled = [(event["done"], event["total"]) for event in events if event["type"] == "filled"]
    assert filled[0] == (0, 2) and filled[-1] == (2, 2)
    assert "".join(event["text"] for event in events if event["type"] == "commit").endswith(" end\n")
    steps = read_trace(trace)
    assert len(steps) == len(events) and steps[0].title == "infill stdin"


def test_a_file_is_replaced_or_another_written(demo_float32, tmp_path):
    file, other = tmp_path / "holes.txt", tmp_path / "filled.txt"
    file.write_text(HOLES)
    asked = ("infill", file, "--tokens", 2, "--model", demo_float32, *QUICK)
    assert run(*asked, "-o", other).stdout == ""
    assert file.read_text() == HOLES and "<FILL>" not in other.read_text()
    assert run(*asked, "--write").stdout == ""
    assert file.read_text() == other.read_text()


def test_lines_as_the_hole(demo_float32):
    done = run(
        "infill",
        "-",
        "--lines",
        "2:3",
        "--tokens",
        3,
        "--exact",
        "--model",
        demo_float32,
        *QUICK,
        text_in="a\nb\nc\nd\n",
    )
    assert done.returncode == 0 and done.stdout.startswith("a\n") and done.stdout.endswith("\nd\n")


def test_an_edit_of_stdin_is_a_diff_and_nothing_else(demo_float32):
    done = run("edit", "-", "sort", "--lines", "2:", "--model", demo_float32, *QUICK, text_in="one\n312\n")
    assert done.returncode == 0 and "tok/s" in done.stderr
    assert done.stdout == "" or done.stdout.startswith("--- a/stdin\n+++ b/stdin\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["edit", "-", "x", "--lines", "1", "--write"], "standard input is no file"),
        (["edit", "-", " ", "--lines", "1"], "instruction is empty"),
        (["infill", "-", "--write"], "standard input is no file"),
        (["infill", "f", "--write", "-o", "g"], "give one of them"),
        (["infill", "-", "--hole", "X", "--lines", "1"], "give one of them"),
        (["infill", "-", "--instruction", ""], "--instruction is empty"),
        (["infill", "-", "--exact", "--tokens", "1", "--hole", "3"], "--exact changes nothing"),
        (["infill", "-", "--exact", "--hole", "312"], "--exact changes nothing"),
        (["infill", "-", "--heat", "--no-canvas"], "--heat colours"),
        (["edit", "-", "x", "--lines", "1", "--json", "--heat"], "--json prints events"),
    ],
)
def test_what_would_change_nothing_is_refused_before_a_model_is_looked_for(arguments, said):
    done = run(*arguments, "--model", "/nowhere", text_in="sort 312")
    assert done.returncode == 2 and "no directory" not in done.stderr
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_a_path_that_cannot_be_written_is_named_first(tmp_path):
    done = run("infill", "-", "-o", tmp_path / "no" / "file", "--model", "/nowhere", text_in=HOLES)
    assert done.returncode == 1 and "there is no such directory" in done.stderr


@pytest.mark.parametrize("verb", [["infill", "-"], ["edit", "-", "sort", "--lines", ":8"]])
def test_ctrl_c_exits_130_and_leaves_the_terminal_clean(demo_float32, verb):
    """On a terminal: a pseudo-terminal's other end reads what is drawn."""
    master, slave = os.openpty()
    process = subprocess.Popen(
        [*COMMAND, *verb, "--model", str(demo_float32)],
        stdin=subprocess.PIPE,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(slave)
    process.stdin.write(("reverse abc <FILL>\n" * 8).encode())
    process.stdin.close()
    seen = b""
    while b"step " not in seen:  # which of them depends on how fast they are: a frame shows the last
        seen += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while part := os.read(master, 4096):
            seen += part
    except OSError:  # what Linux says at the end
        pass
    os.close(master)
    assert process.wait(timeout=60) == 130
    assert seen.rstrip().endswith(b"interrupted") and b"Traceback" not in seen
    for mode in (b"\x1b[?25", b"\x1b[?7"):
        assert seen.rfind(mode + b"h") > seen.rfind(mode + b"l")
    assert b"\x1b[?2026l" in seen[seen.rfind(b"\x1b[?2026h") :]


@pytest.mark.parametrize("verb", [["infill", "--hole", "X"], ["edit", "sort", "--lines", "1"]])
def test_a_trace_replaces_another_file_only_by_force(demo_float32, tmp_path, verb):
    file, trace = tmp_path / "file.txt", tmp_path / "trace"
    file.write_text("reverse abc: X end\n")
    trace.write_text("a thesis")
    asked = (verb[0], file, *verb[1:], "--trace", trace, "--model", demo_float32, *QUICK)
    refused = run(*asked)
    assert refused.returncode == 1 and "is there already" in refused.stderr and trace.read_text() == "a thesis"
    assert run(*asked, "--force").returncode == 0 and read_trace(trace)
    assert run(verb[0], file, *verb[1:], "--force", "--model", demo_float32).returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "trace"]


def test_what_is_written_replaces_a_file_of_another_kind_only_by_force(demo_float32, tmp_path):
    file, out = tmp_path / "file.txt", tmp_path / "picture"
    file.write_text("reverse abc: <FILL> end\n")
    out.write_bytes(b"\x89PNG\xff")
    asked = ("infill", file, "-o", out, "--model", demo_float32, *QUICK)
    assert run(*asked).returncode == 1 and out.read_bytes() == b"\x89PNG\xff"
    assert run(*asked, "--force").returncode == 0 and out.read_text().startswith("reverse abc: ")
