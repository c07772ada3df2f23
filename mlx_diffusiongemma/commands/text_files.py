"""Text files that verbs read and write: UTF-8, byte for byte."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

from ..errors import PromptError
from ..files import WholeFile, look


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
