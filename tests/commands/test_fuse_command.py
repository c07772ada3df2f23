"""`mlx-dg fuse` as a user runs it, and `--adapter`, whose work it makes permanent."""

from __future__ import annotations

from contextlib import chdir

import mlx.core as mx
import pytest
from adapters import saved_adapter
from conftest import DEMO
from typer.testing import CliRunner

from mlx_diffusiongemma import load
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.convert import convert_checkpoint
from mlx_diffusiongemma.model.adapters import AdapterConfig, keys_of

ASKED = ["count from 12", "--seed", "3", "--adapter", "adapters"]


def run(*arguments, cwd="."):
    with chdir(cwd):
        return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def adapters(demo_float32, tmp_path):
    """The folder where an adapter is looked for that is not named."""
    model, _ = load(demo_float32)
    return saved_adapter(model, tmp_path / "adapters", AdapterConfig())


def test_the_fused_checkpoint_writes_what_the_adapter_does(demo_float32, adapters, tmp_path):
    fused = run("fuse", "out", "--model", demo_float32, cwd=tmp_path)
    assert fused.exit_code == 0 and fused.stdout.splitlines()[-1].endswith("out"), fused.stderr
    assert "linear layers merged; rounding took away 0.0% of their change" in fused.stderr
    assert "mlx-dg generate --model" in fused.stderr and "not quite what was trained" not in fused.stderr
    adapted = run("generate", "--model", demo_float32, *ASKED, cwd=tmp_path)
    assert adapted.exit_code == 0 and adapted.stdout.startswith("12 13 14")
    assert run("generate", "--model", "out", *ASKED[:-2], cwd=tmp_path).stdout == adapted.stdout
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (demo_float32, tmp_path / "out"))
    changed = {name for name, array in after.items() if not mx.array_equal(array, before[name])}
    assert len(changed) == 41 and all(name.endswith("proj.weight") for name in changed)


def test_what_rounding_takes_away_is_said(demo_float32, tmp_path):
    base, (model, _) = tmp_path / "base", load(demo_float32)
    convert_checkpoint(DEMO, base, bits=8, overrides={"*": "8"})
    adapter = saved_adapter(model, tmp_path / "small", AdapterConfig(keys=keys_of(["mlp"]), num_layers=1), 0.005)
    fused = run("fuse", tmp_path / "out", "--model", base, "--adapter", adapter)
    assert fused.exit_code == 0 and "not quite what was trained" in fused.stderr, fused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "Missing argument 'OUT'"),
        (["adapters"], 1, "adapters exists already; choose another name or delete it"),
        (["out", "--adapter", "nowhere"], 1, "no directory nowhere"),
        (["out", "--adapter", "empty"], 1, "empty"),
        (["out", "--model", "nowhere"], 1, "no directory nowhere"),
        (["nowhere/out"], 1, "nowhere/out.partial cannot be written"),
    ],
)
def test_what_cannot_be_fused_is_said_in_a_sentence(demo_float32, adapters, tmp_path, arguments, code, said):
    (tmp_path / "empty").mkdir()
    model = [] if "--model" in arguments else ["--model", demo_float32]
    refused = run("fuse", *arguments, *model, cwd=tmp_path)
    assert refused.exit_code == code and said in refused.stderr, refused.stderr
    assert refused.stdout == "" and "Traceback" not in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"adapters", "empty"}
