"""What `mlx-dg convert` shows while it works, and when it is stopped."""

import re

import pytest

from mlx_diffusiongemma.commands import convert as command
from mlx_diffusiongemma.convert import convert_checkpoint

NAME = "model.decoder.layers.29.experts.gate_up_proj.weight"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_numbers_of_a_progress_line_are_whole_in_every_terminal(monkeypatch, capsys, columns):
    for name, value in (("COLUMNS", columns), ("FORCE_COLOR", 1), ("TERM", "xterm")):
        monkeypatch.setenv(name, str(value))
    with command._progress("converting") as progress:
        progress(9_900_000_000, 16_500_000_000, NAME)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()
    assert any(re.match(r"converting 9\.9/16\.5 GB -:--:-- ", line) for line in lines), lines
    assert all(len(line) <= columns - len("^C") for line in lines)
    assert any("layers.29.experts.gate_up_proj" in line for line in lines) == (columns >= 80)


def test_an_interruption_says_what_is_kept(monkeypatch, capsys, tmp_path):
    from convert_data import DEMO

    monkeypatch.setattr("mlx_diffusiongemma.convert.plan.SHARD_BYTES", 400_000)

    def interrupt(done, total, _):
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), command._kept(tmp_path / "out"):
        convert_checkpoint(DEMO, tmp_path / "out", progress=interrupt)
    said = capsys.readouterr().err
    assert f"finished in {tmp_path}/out.partial; the same command goes on from there." in said
