"""Text files that verbs read and write: UTF-8, byte for byte."""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path

from ..errors import PromptError
from ..files import Kind, WholeFile, look


def _is_text(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


TEXT = Kind("a text", _is_text)


def read_text(path: str) -> str:
    """The text of the file at `path`, or of stdin where that is "-"; line ends stay as they are. Raises PromptError."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}).") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise PromptError(f"{'Standard input' if path == '-' else path} is not UTF-8 text; convert it first.") from None


def write_out(text: str) -> None:
    """Write `text` to stdout exactly, byte for byte."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()


def replace_text(path: str, before: str, after: str) -> None:
    """Put `after` in the place of `before`, the content of the file at `path`, in one step; its mode stays.

    Raises PromptError, and leaves the file as it is, where it has changed meanwhile or cannot be written.
    """
    try:
        with WholeFile(Path(path)) as file:
            file.write(after.encode("utf-8"))
            if Path(path).read_bytes() != before.encode("utf-8"):
                raise PromptError(
                    f"{path} has changed since it was read; it is left as it is, so run the command again."
                )
    except OSError as error:
        raise PromptError(f"{path} cannot be written ({error.strerror}); it is unchanged.") from None


def check_replaceable(path: str) -> None:
    """Make sure, before the work, that `replace_text` may replace the file at `path`. Raises PromptError."""
    try:
        replaced = look(Path(path))
    except OSError as error:
        raise PromptError(f"{path} cannot be written ({error.strerror}); change that, or leave --write out.") from None
    if path == "-" or (replaced and not stat.S_ISREG(replaced.st_mode)):
        raise PromptError(f"{path} is no file that could be replaced; leave --write out, or give one.")


def line_span(text: str, lines: str, *, may_be_empty: bool = False) -> tuple[int, int]:
    """Find the characters of the lines named as in 10:20, 10: (to the end), :20 or 10, without the last one's end.

    Raises PromptError where they are no lines of the text, or hold nothing and `may_be_empty` is false.
    """
    found = re.fullmatch(r"(\d*)(:?)(\d*)", lines, re.ASCII)
    if not found or not (found[1] or found[3]):
        raise PromptError(f"--lines is {lines!r}; give the first and the last line as in 10:20, 10: or :20.")
    starts = [0, *(place.end() for place in re.finditer("\n", text))]
    count = len(starts) - (starts[-1] == len(text))
    first = int(found[1] or 1)
    last = int(found[3] or (count if found[2] else first))
    if not 1 <= first <= last <= count:
        has = f"{count} line{'s' * (count != 1)}"
        raise PromptError(f"--lines {lines} does not lie in the text, which has {has}; give some of those.")
    stop = starts[last] - 1 if last < len(starts) else len(text)
    if text[starts[first - 1] : stop].endswith("\r"):
        stop -= 1
    if stop == starts[first - 1] and not may_be_empty:
        raise PromptError(f"--lines {lines} has nothing to edit; give lines that are not empty.")
    return starts[first - 1], stop
