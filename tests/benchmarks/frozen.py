"""A frozen program: how large it is, what is in it, and that it answers. Slow: it makes a fresh environment.

python tests/benchmarks/frozen.py [--with PACKAGE …]

--with: packages that are installed as well, and must not get into the program, such as torch and pytest.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNWANTED = ("torch", "pytest", "_pytest", "tensorflow", "datasets", "pandas", "scipy", "mlx_vlm")
PROGRAM = '''\
"""Ask a DiffusionGemma checkpoint."""

import sys

from mlx_diffusiongemma import generate, load

model, processor = load(sys.argv[1])
result = generate(model, processor, sys.argv[2], seed=0)
print(result)
print(result.stats.tokens_per_second > 0)
'''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with", nargs="*", default=[], dest="others", metavar="PACKAGE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        binaries = work / "venv" / "bin"
        run(sys.executable, "-m", "venv", work / "venv")
        run(binaries / "pip", "install", "--quiet", f"{ROOT}[cpu]", "pyinstaller", *arguments.others)
        run(binaries / "mlx-dg", "convert", ROOT / "mlx_diffusiongemma" / "demo", work / "demo", "--q4")
        (work / "ask.py").write_text(PROGRAM)
        run(binaries / "pyinstaller", "--log-level", "ERROR", "ask.py", cwd=work)
        # No Python of the environment is at hand any more.
        (work / "venv").rename(work / "gone")
        printed = run(work / "dist" / "ask" / "ask", work / "demo", "reverse canvas", cwd="/", env={})
        inside = work / "dist" / "ask"
        files = [path for path in sorted(inside.rglob("*")) if path.is_file() and not path.is_symlink()]
        archived = set(re.findall(r"^\s*\('([\w.]+)'", (work / "build/ask/PYZ-00.toc").read_text(), re.MULTILINE))
        names = archived | {
            ".".join(path.relative_to(inside / "_internal").parts) for path in files if path.parent != inside
        }
        unwanted = [name for name in UNWANTED if any(f"{n}.".startswith(f"{name}.") for n in names)]
        models = [name for name in archived if re.search(r"^transformers\.models\.\w+\.modeling", name)]
        models = [name for name in models if not name.startswith("transformers.models.auto.")]
        print(f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB in {len(files)} files")
        print(f"unwanted packages: {unwanted or 'none'}; models of Transformers: {models or 'none'}")
        print(f"it says: {printed.split()}")
        return int(bool(unwanted or models or printed.split() != ["savnac", "True"]))


def run(*command: object, **options: object) -> str:
    """What a command prints. Raises CalledProcessError."""
    return subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True, **options).stdout


if __name__ == "__main__":
    sys.exit(main())
