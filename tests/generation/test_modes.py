"""Named settings: the reference's are the checkpoint's own, and an explicit option wins over a mode."""

import pytest
from typer.testing import CliRunner

from mlx_diffusiongemma import MODES, GenerationOptions, generate, load
from mlx_diffusiongemma.cli import app


def test_the_reference_leaves_everything_to_the_checkpoint():
    assert MODES["reference"] == GenerationOptions()


def test_explicit_options_win():
    options = GenerationOptions(max_steps=3).filled_from(MODES["fast"])
    assert options.max_steps == 3 and options.stability == MODES["fast"].stability


def test_fast_takes_fewer_steps_for_the_same_reply(demo_float32):
    model, processor = load(demo_float32)
    plain = generate(model, processor, "reverse canvas", seed=0)
    fast = generate(model, processor, "reverse canvas", seed=0, options=MODES["fast"])
    assert fast.text == plain.text == "savnac" and sum(fast.stats.steps) < sum(plain.stats.steps)


@pytest.mark.parametrize(("mode", "code"), [("fast", 0), ("quick", 2)])
def test_the_command_takes_a_mode(demo_float32, mode, code):
    asked = ["generate", "reverse canvas", "--mode", mode, "--model", str(demo_float32), "--seed", "0", "--json"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == code and ('"steps":[1]' in found.stdout) == (code == 0)
