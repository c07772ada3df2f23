"""Help as it is printed: nothing lost, nothing of Python in it, no line too long, and examples that can be typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from mlx_diffusiongemma.cli import EXAMPLES, app
from mlx_diffusiongemma.commands import common
from mlx_diffusiongemma.errors import CheckpointError

GROUP = get_command(app)
PAGES = [
    [],
    *([name] for name in GROUP.commands),
    *([name, verb] for name, group in GROUP.commands.items() for verb in getattr(group, "commands", {})),
]
# Of Python, or of the library that reads the command line.
LEAKS = re.compile(r"<(?:str|int|float|bool|path|file|list\[.*?\]|uuid|.* range)>|None|\bPath\b|x>=|\x08|\x1b")


def command_at(path: list[str]):
    """The command that these words reach."""
    command = GROUP
    for name in path:
        command = command.commands[name]
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: " ".join(page) or "mlx-dg")
def test_a_help_page_reads_as_it_was_written(page):
    environment = {**os.environ, "COLUMNS": "80"}
    program = [str(Path(sys.executable).with_name("mlx-dg")), *page, "--help"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not LEAKS.search(done.stdout)
    text = " ".join(done.stdout.split())
    command = command_at(page)
    if page:
        assert " ".join(command.help.split("\n\n")[0].split()) in text
    for parameter in command.params:
        written = getattr(parameter, "help", None)
        assert getattr(parameter, "hidden", False) or not written or " ".join(written.split()) in text
    for subcommand in getattr(command, "commands", {}).values():
        assert subcommand.get_short_help_str(200) in text


def test_every_verb_has_examples_that_can_be_typed():
    assert set(EXAMPLES) == set(GROUP.commands)
    for name, lines in EXAMPLES.items():
        assert 2 <= len(lines.strip().splitlines()) <= 5
        for line in lines.strip().splitlines():
            words = shlex.split(line.partition("mlx-dg ")[2], comments=False)
            end = next((place for place, word in enumerate(words) if word in ("|", ">", "<", "&&")), len(words))
            verb, *rest = words[:end]
            assert verb == name or name == "models"
            command = GROUP.commands[verb]
            if rest and rest[0] in getattr(command, "commands", {}):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(verb, rest, resilient_parsing=False)  # raises where it is not understood


def test_the_shell_can_complete():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mlx-dg"))],
        env={**os.environ, "_MLX_DG_COMPLETE": "complete_bash", "COMP_WORDS": "mlx-dg gen", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["generate"]


def test_every_verb_that_may_download_can_be_told_not_to_ask(monkeypatch):
    asked = []
    monkeypatch.setattr(common, "announce_download", lambda *_, **how: asked.append(how["yes"]))
    for name, command in GROUP.commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--model" in options or name == "convert") == ("--yes" in options), name
    for yes in (True, False):
        with pytest.raises(CheckpointError):
            common.load_model("/nowhere", yes=yes)
    assert asked == [True, False]


def test_a_terminal_gets_sentences_broken_between_words(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    sentence = f"The text took 19 canvases; a hole sees only {'x' * 50} what follows on its own.\n  a table   stays"
    common.say(sentence)
    assert capsys.readouterr().err == sentence + "\n"  # a pipe gets it as it is
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    common.say(sentence)
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(lines[:-1]) == sentence.split("\n")[0] and lines[-1] == "  a table   stays"
    assert all(len(line) <= 40 for line in lines if "x" * 50 not in line)
