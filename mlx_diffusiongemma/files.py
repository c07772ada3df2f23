"""Files that the package writes: each appears whole or not at all, and never takes the place of something else."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .errors import PromptError
from .paths import user_path

UNFINISHED = ".mlx-dg."  # how the name of a file begins that is still being written


@dataclass(frozen=True)
class Kind:
    """A kind of file. name: as in "a trace". is_one: whether the file at a path is one; it may raise OSError."""

    name: str
    is_one: Callable[[Path], bool]


class WholeFile:
    """A file that is written beside its place, as `file`, and put there by `keep`; until then the place is as it was.

    What it replaces keeps its mode and, where that is allowed, its owner; a symlink stays, and the file that it leads
    to is replaced. What is no regular file, such as a pipe or a terminal, is written to directly. As a context, the
    file is kept at the end of the block and dropped where an exception leaves it. check: called right before the file
    takes its place, and may raise. Raises OSError, PermissionError for a file that is read-only, to whoever owns it.
    """

    def __init__(self, path: Path, check: Callable[[], object] = lambda: None):
        self._check = check
        self._unfinished: Path | None = None
        found = look(path)
        if found and not stat.S_ISREG(found.st_mode):
            self.file: BinaryIO = path.open("wb")
            return
        self._target = path.resolve()
        self._unfinished = self._target.with_name(UNFINISHED + secrets.token_hex(6))
        try:
            # A new file's mode is what the process gives all its files, which `tempfile` would not.
            self.file = self._unfinished.open("x+b")
        except BaseException:
            self._remove()
            raise

    @property
    def is_direct(self) -> bool:
        """Whether the place itself is written to: a pipe, a terminal or another device."""
        return self._unfinished is None

    def keep(self) -> None:
        """Put the file, as it is now, in its place; where that fails, drop it and raise why."""
        try:
            self.file.flush()
            if self._unfinished:
                self._take_after(look(self._target))
                os.fsync(self.file.fileno())
            self.file.close()
            self._check()
            if self._unfinished:
                self._unfinished.replace(self._target)
        except BaseException:
            self.drop()
            raise
        if self._unfinished:
            sync(self._target.parent)

    def drop(self) -> None:
        """Leave the place as it is, and nothing beside it; does nothing to a file that was kept."""
        with contextlib.suppress(OSError):  # as closing writes what is left in its buffer
            self.file.close()
        self._remove()

    def _remove(self) -> None:
        if self._unfinished:
            with contextlib.suppress(OSError):
                self._unfinished.unlink()

    def _take_after(self, old: os.stat_result | None) -> None:
        """Give the new file the mode and the owner of the old one."""
        if old is None:
            return
        new = os.fstat(self.file.fileno())
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            with contextlib.suppress(PermissionError):
                os.fchown(self.file.fileno(), old.st_uid, old.st_gid)
        os.fchmod(self.file.fileno(), stat.S_IMODE(old.st_mode))

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.keep()
        else:
            self.drop()


def check_place(path: str | Path, kind: Kind, *, force: bool = False, inputs: Sequence[str | Path] = ()) -> Path:
    """Make sure that a file of `kind` may be written at `path`, and return it with a leading ~ resolved.

    It may replace an empty file and one of its own kind, with `force` any file; never a read-only one, nor one of
    `inputs`, which are being read. Raises PromptError.
    """
    with explained(path, kind, RuntimeError, ValueError):  # the latter for what no path can be
        place = user_path(path)
        found = look(place)
        if not os.path.isdir(place.resolve().parent):
            raise FileNotFoundError(errno.ENOENT, "there is no such directory")
        if not found or not stat.S_ISREG(found.st_mode):
            return place
        if any(os.path.exists(given) and os.path.samefile(given, place) for given in inputs):
            raise PromptError(f"{path} is the file that is being read; give another path for {kind.name}.")
        if not force and found.st_size and not _is_one(kind, place):
            raise PromptError(
                f"{path} is there already and is not {kind.name}; give another path, or --force to replace it."
            )
        return place


@contextlib.contextmanager
def write_file(
    path: str | Path, kind: Kind, *, force: bool = False, inputs: Sequence[str | Path] = ()
) -> Iterator[BinaryIO]:
    """Write a file of `kind` at `path`, where `check_place` allows it: whole, or not at all. Raises PromptError."""
    file = open_file(path, kind, force=force, inputs=inputs)
    with explained(path, kind), file:
        yield file.file


def open_file(path: str | Path, kind: Kind, *, force: bool = False, inputs: Sequence[str | Path] = ()) -> WholeFile:
    """Begin a file of `kind` for `path`, where `check_place` allows it now and when it is kept. Raises PromptError."""

    def check() -> Path:
        return check_place(path, kind, force=force, inputs=inputs)

    place = check()
    with explained(path, kind):
        return WholeFile(place, check)


@contextlib.contextmanager
def explained(path: str | Path, kind: Kind, *errors: type[Exception]) -> Iterator[None]:
    """Raise PromptError for OSError and other `errors` that keep a file of `kind` from being written at `path`."""
    kinds: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except kinds as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        name = kind.name.partition(" ")[2]  # without its article
        raise PromptError(f"The {name} cannot be written to {path} ({reason}); give another path.") from None


def write_whole(path: Path, text: str) -> None:
    """Write a small text file so that even a crash leaves either the old content or the new. Raises OSError."""
    with WholeFile(path) as file:
        file.write(text.encode("utf-8"))


def look(path: Path) -> os.stat_result | None:
    """Look at what is to be replaced at `path`, None for nothing. Raises OSError where it is not to be replaced."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    # The superuser may write to all files, and still means to keep those that he made read-only.
    if not found.st_mode & 0o222 or not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "it is read-only", str(path))
    return found


def sync(directory: Path) -> None:
    """Make sure that the names in `directory` are on the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_one(kind: Kind, place: Path) -> bool:
    try:
        return kind.is_one(place)
    except OSError:
        return False
