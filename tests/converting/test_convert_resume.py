"""Conversions killed at random moments go on where they were and end with the same bytes."""

import os
import random
import signal
import subprocess
import sys

from convert_data import copy_demo, split

# Converts with small shards and kills itself at the n-th report of progress, counted over all files.
CODE = """
import os, signal, sys
from mlx_diffusiongemma.convert import convert_checkpoint, plan
plan.SHARD_BYTES = 200_000
left = int(sys.argv[3])
def progress(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
report = convert_checkpoint(sys.argv[1], sys.argv[2], progress=progress)
print(report.resumed)
"""


def convert(source, out, kill_at):
    command = [sys.executable, "-c", CODE, str(source), str(out), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))


def test_killed_at_twenty_random_moments(tmp_path):
    source = split(copy_demo(tmp_path / "source"))
    assert convert(source, tmp_path / "whole" / "out", 0).returncode != 0  # no such parent
    (tmp_path / "whole").mkdir()
    assert convert(source, tmp_path / "whole" / "out", 0).returncode == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "out").iterdir()}
    moments = random.Random(0)
    out, kills = tmp_path / "out", 0
    while kills < 20:
        killed = convert(source, out, moments.randint(1, 120))
        if killed.returncode == -signal.SIGKILL:
            kills += 1
            assert not out.exists() and (tmp_path / "out.partial").is_dir()
        else:
            assert killed.returncode == 0, killed.stderr
            assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
            out.rename(tmp_path / f"done-{kills}")
    assert convert(source, out, 0).returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert not (tmp_path / "out.partial").exists()
