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
