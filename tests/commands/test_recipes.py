"""The recipes in examples/ make data that can be learned from, train, and draw, on the demo checkpoint."""

from __future__ import annotations

import json
import random
import re
import runpy
import shutil
import sys
import xml.dom.minidom
from contextlib import chdir
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

import mlx_diffusiongemma
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.convert import convert_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = ["--train", "12", "--valid", "4", "--test", "4"]


def script(name, monkeypatch, *arguments):
    """Run a recipe's script as a user does."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def lines_of(folder):
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}


def train(folder, config, *arguments):
    short = ["--iters", 2, "--steps-per-report", 1, "--steps-per-eval", 2, "--val-batches", 2, "--generate", 2]
    with chdir(folder):
        command = ["train", "-c", EXAMPLES / config, "--grad-accumulation-steps", 1, *short, *arguments]
        done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.stderr
    return done


def check_solved(rows):
    """Every row, column and box holds every digit."""
    size, side = len(rows), int(len(rows) ** 0.5)
    boxes = [
        "".join(rows[top + line][left : left + side] for line in range(side))
        for top in range(0, size, side)
        for left in range(0, size, side)
    ]
    for unit in [*rows, *map("".join, zip(*rows, strict=True)), *boxes]:
        assert sorted(unit) == [str(digit) for digit in range(1, size + 1)]


@pytest.mark.parametrize(("size", "clues", "most"), [(4, 6, 7), (9, 45, 45)])
def test_puzzles_have_one_solution_which_is_the_reply(monkeypatch, tmp_path, size, clues, most):
    script("sudoku/puzzles.py", monkeypatch, tmp_path, "--size", size, "--clues", clues, *FEW)
    recipe = runpy.run_path(str(EXAMPLES / "sudoku/puzzles.py"))
    made = lines_of(tmp_path)
    assert {name: len(lines) for name, lines in made.items()} == {"train": 12, "valid": 4, "test": 4}
    prompts = [{line["prompt"] for line in lines} for lines in made.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    for line in [line for lines in made.values() for line in lines]:
        puzzle, solved = line["prompt"].split("\n\n")[1].split("\n"), line["completion"].split("\n")
        check_solved(solved)
        given = "".join(puzzle)
        assert clues <= sum(cell != "." for cell in given) <= most
        assert all(cell in (".", digit) for cell, digit in zip(given, "".join(solved), strict=True))
        grid = [0 if cell == "." else int(cell) for cell in given]
        assert [recipe["written"](found) for found in recipe["solutions"](grid, random.Random(0))] == [
            "\n".join(solved)
        ]


def test_puzzles_are_the_same_for_a_seed(monkeypatch, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script("sudoku/puzzles.py", monkeypatch, tmp_path / name, "--size", 4, "--seed", seed, *FEW)
    a, b, c = (lines_of(tmp_path / name) for name in "abc")
    assert a == b != c


def test_the_sudoku_recipe_trains_and_draws_its_curve(demo_float32, monkeypatch, tmp_path):
    script("sudoku/puzzles.py", monkeypatch, tmp_path / "data", "--size", 4, *FEW)
    done = train(tmp_path, "sudoku/sudoku.yaml", "--model", demo_float32)
    assert "of 2 replies as expected" in done.stderr
    script("sudoku/curve.py", monkeypatch, tmp_path / "curve.jsonl", tmp_path / "curve.svg")
    drawn = xml.dom.minidom.parse(str(tmp_path / "curve.svg"))
    assert len(drawn.getElementsByTagName("polyline")) == 6
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    keys = config["lora_parameters"]["keys"]
    assert {"self_attn.q_proj", "mlp.up_proj", "router.proj", "self_conditioning.gate_proj"} <= set(keys)


def test_a_curve_shows_what_there_is():
    recipe = runpy.run_path(str(EXAMPLES / "sudoku/curve.py"))
    lines = [
        '{"iteration": 1, "val_right": 0.25}',
        '{"iteration": 9, "val_right": 0.5}',
        '{"iteration": 9, "val_right": 1}',
    ]
    curves = recipe["read_curves"](lines)
    assert curves["val_right"] == [(1, 0.25), (9, 1)]
    drawn = xml.dom.minidom.parseString(recipe["draw"](curves))
    [line] = drawn.getElementsByTagName("polyline")
    first, last = (point.split(",") for point in line.getAttribute("points").split())
    heights = [float(first[1]), float(last[1])]
    assert heights == sorted(heights, reverse=True) and heights[0] - heights[1] == pytest.approx(
        0.75 * recipe["HEIGHT"]
    )


def test_the_json_recipe_makes_orders_trains_and_scores(demo_float32, monkeypatch, capsys, tmp_path):
    script("teach_json/orders.py", monkeypatch, tmp_path / "data", *FEW)
    made = lines_of(tmp_path / "data")
    assert [len(made[name]) for name in ("train", "valid", "test")] == [12, 4, 4]
    for line in made["train"]:
        order = json.loads(line["completion"])
        assert order["n"] == sum(count for _, count in order["is"]) and order["to"].title() in line["prompt"]
    train(tmp_path, "teach_json/orders.yaml", "--model", demo_float32)
    for adapter in ([], [tmp_path / "adapters"]):
        script("teach_json/score.py", monkeypatch, demo_float32, tmp_path / "data" / "test.jsonl", *adapter)
        assert re.fullmatch(r"\d of 4 are JSON, 0 are as expected; [\d.]+ steps per canvas\n", capsys.readouterr().out)


def test_the_demo_checkpoint_learns_its_tasks_further(monkeypatch, tmp_path):
    without = tmp_path / "kept.jsonl"
    kept = {"messages": [{"role": "user", "content": "sort 123"}], "tools": None}
    without.write_text(json.dumps(kept) + "\n")
    script(
        "demo_checkpoint/tasks.py", monkeypatch, tmp_path / "data", "--train", 60, "--valid", 4, "--without", without
    )
    lines = lines_of(tmp_path / "data")
    assert {name: len(made) for name, made in lines.items()} == {"train": 60, "valid": 4}
    every = json.dumps(lines)
    assert all(kind in every for kind in ("sort", "reverse", "solve", "count", "get_weather", "colors?", "reasoning"))
    demo = Path(mlx_diffusiongemma.__file__).parent / "demo"
    convert_checkpoint(demo, tmp_path / "start", bits=None, dtype="float32")
    train(tmp_path, "demo_checkpoint/demo.yaml", "--batch-size", 2)
    checkpoint = tmp_path / "published"
    shutil.copytree(demo, checkpoint)
    script("demo_checkpoint/write.py", monkeypatch, tmp_path / "run", checkpoint)
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (demo, checkpoint))
    assert {name: (array.shape, array.dtype) for name, array in before.items()} == {
        name: (array.shape, array.dtype) for name, array in after.items()
    }
    changed = {name for name, array in before.items() if not mx.array_equal(array, after[name])}
    assert any("experts.gate_up_proj" in name for name in changed) and len(changed) > 20
