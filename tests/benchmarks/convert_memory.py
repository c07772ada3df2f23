"""Peak resident memory and seconds of converting a checkpoint, here and (with --mlx-vlm) by mlx_vlm.convert.

    python tests/benchmarks/convert_memory.py /tmp/synthetic --mlx-vlm

Each conversion runs in a process of its own, and what it wrote is deleted afterwards. Memory-mapped pages count.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

OURS = (
    "from mlx_diffusiongemma.convert import convert_checkpoint; convert_checkpoint({source!r}, {out!r}, **{options!r})"
)
THEIRS = "from mlx_vlm.convert import convert; convert({source!r}, {out!r}, quantize=True, q_bits=4)"


def measure(code: str) -> tuple[float, float]:
    """Run Python code in a new process; returns (peak resident GB, seconds)."""
    started = time.monotonic()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], dict(os.environ))
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"The conversion failed (status {status}).")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit / 1e9, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--mlx-vlm", action="store_true", help="measure mlx_vlm.convert too")
    parser.add_argument("--recipe", default="community")
    parser.add_argument("--bits", type=int, help="the recipe's own otherwise")
    parser.add_argument("--mode", default="affine")
    arguments = parser.parse_args()
    options = {"recipe": arguments.recipe, "mode": arguments.mode}
    options |= {"bits": arguments.bits} if arguments.bits else {}
    runs = {"mlx-diffusiongemma": OURS} | ({"mlx-vlm": THEIRS} if arguments.mlx_vlm else {})
    size = sum(path.stat().st_size for path in arguments.source.glob("*.safetensors"))
    print(f"{arguments.source}: {size / 1e9:.1f} GB of weights, {options}")
    for name, code in runs.items():
        with tempfile.TemporaryDirectory(dir=arguments.source.parent) as directory:
            out = str(Path(directory) / "out")
            memory, seconds = measure(code.format(source=str(arguments.source), out=out, options=options))
            shutil.rmtree(out)
        print(f"{name:<20} {memory:6.2f} GB peak, {seconds:6.1f} s")


if __name__ == "__main__":
    main()
