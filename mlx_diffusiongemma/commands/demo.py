"""The verb `mlx-dg demo`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import typer

from ..paths import cache_directory
from .common import AsJson, LiveCanvas, Seed, check_watching, end_line, say

HASHES = "hashes.txt"
TASKS = ("sort 53142", "reverse canvas", "json name=ada age=36", "solve 42.3/3.24/1.../2.31", "count from 17")


def demo(seed: Seed = 0, live: LiveCanvas = None, as_json: AsJson = False) -> None:
    """Convert and run the small trained checkpoint that comes with this package; nothing is downloaded."""
    from .. import load, stream
    from ..display.terminal import show, statistics_line
    from ..display.trace import event_json

    check_watching(as_json, live, heat=False)
    directory = _demo_checkpoint()
    model, processor = load(directory)
    for task in TASKS:
        if as_json:
            for event in stream(model, processor, task, seed=seed):
                typer.echo(event_json(event))
            continue
        typer.secho(f"> {task}", err=True, bold=True)
        done = show(stream(model, processor, task, seed=seed), live=live)
        end_line()
        typer.secho(statistics_line(done.stats), err=True, dim=True)


def _demo_checkpoint() -> Path:
    """The demo checkpoint at 4 bits, converted into the user's cache directory where it is not there, whole.

    Everything in that directory must be as it was written: a damaged checkpoint may load, and then writes nonsense.
    """
    from .. import __version__
    from ..convert import convert_checkpoint

    source = Path(__file__).parent.parent / "demo"
    place = cache_directory() / f"demo-4bit-{__version__}"
    if _is_whole(place, source):
        return place
    damaged = " again: what is there is damaged" if os.path.lexists(place) else ""
    say(f"Converting the demo checkpoint to 4 bits in {place}{damaged}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".demo-") as unfinished:
        new = Path(unfinished) / "demo"
        convert_checkpoint(source, new, bits=4)
        (new / HASHES).write_text(_hashes(source) + _hashes(new), encoding="utf-8")
        if place.is_symlink() or place.is_file():
            place.unlink()
        elif place.exists():
            place.rename(Path(unfinished) / "damaged")
        try:
            new.rename(place)
        except OSError:  # another process was faster
            if not _is_whole(place, source):
                raise
    return place


def _is_whole(place: Path, source: Path) -> bool:
    """Whether `place` holds what was made of `source`, and nothing of it has changed since."""
    try:
        return (place / HASHES).read_text(encoding="utf-8") == _hashes(source) + _hashes(place)
    except (OSError, UnicodeDecodeError):
        return False


def _hashes(directory: Path) -> str:
    """The SHA-256 and the name of every file in a directory, a line each."""
    from ..convert.writing.hashes import file_sha256

    files = sorted(path for path in directory.iterdir() if path.name != HASHES)
    return "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)
