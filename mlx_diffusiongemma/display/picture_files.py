"""Files of pictures: which ones a new picture may replace, and how an SVG is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import Kind, write_file

# How files begin that a picture may replace.
GIF_BEGINS = re.compile(rb"GIF8[79]a")
SVG_BEGINS = re.compile(rb"(?:\xef\xbb\xbf)?(?:\s|<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE svg[^>]*>)*<svg[\s>]", re.DOTALL)


def _begins(pattern: re.Pattern[bytes]) -> Callable[[Path], bool]:
    def is_one(path: Path) -> bool:
        with path.open("rb") as file:
            return pattern.match(file.read(4096)) is not None

    return is_one


GIF, SVG = Kind("a GIF", _begins(GIF_BEGINS)), Kind("an SVG picture", _begins(SVG_BEGINS))


def write_svg(svg: str, path: str | Path, *, force: bool = False, inputs: Sequence[str | Path] = ()) -> None:
    """Write what `animated_svg` or `entropy_svg` drew to the file at `path`.

    force: replace a file that is no SVG, too. inputs: files that are being read, which it never replaces.
    Raises PromptError.
    """
    with write_file(path, SVG, force=force, inputs=inputs) as file:
        file.write(svg.encode("utf-8"))
