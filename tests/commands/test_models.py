"""Models by name: what is remembered, listed, used and removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import DEMO
from typer.testing import CliRunner

from mlx_diffusiongemma.checkpoints import memory
from mlx_diffusiongemma.checkpoints.remembered import find, last_used, list_file, remember, remembered, source_of
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.errors import PromptError


def run(*arguments: object, text_in: str = ""):
    return CliRunner().invoke(app, list(map(str, arguments)), input=text_in)


@pytest.fixture
def mine(demo_float32, tmp_path) -> Path:
    """A checkpoint that may be deleted."""
    return Path(shutil.copytree(demo_float32, tmp_path / "one" / "mine"))


def test_what_was_used_is_found_from_any_folder(mine, demo_4bit, tmp_path, monkeypatch):
    monkeypatch.chdir(mine.parent)
    assert run("generate", "sort 312", "--seed", 1, "--model", "mine").stdout == "123\n"
    monkeypatch.chdir(tmp_path)
    named = run("generate", "sort 312", "--seed", 1, "--model", "mine")
    assert (named.exit_code, named.stdout) == (0, "123\n")
    remember(demo_4bit)
    remember(mine)
    unnamed = run("generate", "sort 312", "--seed", 1)
    assert unnamed.stdout == "123\n" and f"Using mine ({mine})" in unnamed.stderr
    assert run("check", "mine").stdout == f"{mine} is whole.\n"


def test_convert_remembers_what_it_wrote(tmp_path):
    assert run("convert", DEMO, tmp_path / "new", "--q4").exit_code == 0
    assert last_used().source == str(tmp_path / "new")


def test_names_are_unique_and_stay(mine, tmp_path):
    other = shutil.copytree(mine, tmp_path / "two" / "mine")
    for path in (mine, other, mine, "owner/mine"):
        remember(path)
    assert [(model.name, model.source) for model in remembered()] == [
        ("mine-3", "owner/mine"),
        ("mine", str(mine)),
        ("mine-2", str(other)),
    ]
    assert find("owner/mine") == find("mine-3") and find(str(other)).name == "mine-2"
    assert source_of("mine-2") == str(other) and source_of("who/else") == "who/else"
    with pytest.raises(PromptError, match="there are mine-3, mine, mine-2"):
        find("yours")


def test_a_directory_that_is_there_wins_over_a_name(mine, tmp_path, monkeypatch):
    remember(mine)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert source_of("mine") == "mine"


def test_the_list_says_what_a_model_is(mine, demo_4bit, tmp_path, monkeypatch):
    gone, damaged = tmp_path / "gone", Path(shutil.copytree(mine, tmp_path / "damaged"))
    for path in (demo_4bit, mine, gone, damaged, "nobody/nothing"):
        Path(path).mkdir(exist_ok=True) if path == gone else None
        remember(path)
    gone.rmdir()
    (damaged / "config.json").write_text("{")
    done = run("models")
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["NAME", "nothing", "damaged", "gone", "mine", "demo-4bit"]
    rest = dict(lines)
    assert "not here" in rest["nothing"] and "damaged" in rest["damaged"] and "missing" in rest["gone"]
    assert "8.2 MB" in rest["mine"] and "unquantized" in rest["mine"] and rest["mine"].endswith(str(mine))
    assert "community, 4-bit" in rest["demo-4bit"] and " yes " in rest["demo-4bit"]
    assert last_used().name == "nothing"
    monkeypatch.setattr(memory, "usable_bytes", lambda: 2**20)
    assert " no " in next(line for line in run("models").stdout.splitlines() if line.startswith("mine"))


def test_without_any_it_says_how_to_get_one():
    done = run("models")
    assert (done.exit_code, done.stdout) == (0, "") and "mlx-dg convert --q4" in done.stderr


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"models": [{"name": 1, "source": "x"}]}', '{"models": [{}]}', "\0"]
)
def test_a_damaged_list_is_ignored_with_a_sentence(mine, content):
    list_file().parent.mkdir(parents=True, exist_ok=True)
    list_file().write_text(content)
    done = run("models")
    said = [line for line in done.stderr.splitlines() if line.startswith("mlx-dg: ")]
    assert done.exit_code == 0 and len(said) == 1 and "ignored" in said[0]
    remember(mine)
    assert find("mine").source == str(mine)


def test_a_list_that_cannot_be_written_is_no_error(mine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    done = run("generate", "sort 312", "--seed", 1, "--model", mine)
    assert (done.exit_code, done.stdout) == (0, "123\n") and "cannot be written" in done.stderr


def test_remove_asks_and_deletes_only_the_checkpoint(mine, monkeypatch):
    (mine / "thesis.txt").write_text("years of work")
    remember(mine)
    assert run("models", "remove", "mine").exit_code == 2  # nobody can be asked
    monkeypatch.setattr("mlx_diffusiongemma.commands.models.can_ask", lambda: True)
    kept = run("models", "remove", "mine", text_in="n\n")
    assert "Nothing is deleted" in kept.stderr and (mine / "model.safetensors").exists() and find("mine")
    done = run("models", "remove", "mine", text_in="y\n")
    assert done.exit_code == 0 and str(mine) in done.stderr
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    assert remembered() == []


def test_remove_without_asking_and_without_deleting(mine):
    remember(mine)
    assert run("models", "remove", mine, "--keep-files").exit_code == 0
    assert mine.is_dir() and remembered() == []
    remember(mine)
    assert run("models", "remove", "mine", "--yes").exit_code == 0
    assert not mine.exists() and remembered() == []
    done = run("models", "remove", "mine", "--yes")
    assert done.exit_code == 1 and "none is known yet" in done.stderr


def test_a_repository_is_removed_from_the_hubs_cache(demo_float32, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--small" / "snapshots" / ("0" * 40)
    shutil.copytree(demo_float32, snapshot)
    (cache / "models--owner--small" / "refs").mkdir()
    (cache / "models--owner--small" / "refs" / "main").write_text("0" * 40)
    other = cache / "models--owner--other" / "snapshots" / ("1" * 40)
    shutil.copytree(demo_float32, other)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    remember("owner/small")
    done = run("models", "remove", "small", "--yes")
    assert done.exit_code == 0 and "Deleted 8.3 MB of owner/small." in done.stderr, done.stderr
    assert not (cache / "models--owner--small").exists() and other.is_dir() and remembered() == []
