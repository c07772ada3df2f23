"""OUT.partial: where a conversion's files wait until all are there, and what a stopped one is resumed from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.hub import Interrupted
from ...errors import CheckpointError
from ...files import UNFINISHED, sync, write_whole
from .hashes import file_sha256

RECORD = "finished-shards.json"
DOWNLOADS = "source"  # inside OUT.partial: files of the source that are not converted yet


class Partial:
    """The directory beside `out` that becomes it when whole.

    `fingerprint` identifies source, options and versions: finished shards of another conversion are not used.
    `finished` holds what `finish` was given for every shard that is whole, and survives until the conversion does.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self.fingerprint = fingerprint
        self.finished: dict[str, dict[str, Any]] = {}

    def finish(self, shard: str, record: dict[str, Any]) -> None:
        """Note that `shard`, whose SHA-256 is record["sha256"], is whole and on the disk."""
        self.finished[shard] = record
        self._save()

    def publish(self) -> None:
        """Give the directory its final name."""
        (self.path / RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.path / DOWNLOADS, ignore_errors=True)
        self.path.rename(self.out)
        sync(self.out.parent)

    @property
    def is_resumable(self) -> bool:
        """Whether a later run has anything to gain from what is here."""
        return bool(self.finished) or (self.path / DOWNLOADS).is_dir()

    def recall(self) -> None:
        """Load the record of an earlier run with the same fingerprint; delete all that it does not vouch for."""
        keep = set()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads((self.path / RECORD).read_text())
            if content["fingerprint"] == self.fingerprint:
                keep = {DOWNLOADS}
                for name, record in content["shards"].items():
                    if file_sha256(self.path / name) == record["sha256"]:
                        self.finished[name] = record
        for path in self.path.iterdir():
            if path.name not in keep | set(self.finished):
                remove(path)
        self._save()

    def _save(self) -> None:
        write_json(self.path / RECORD, {"fingerprint": self.fingerprint, "shards": self.finished})


@contextlib.contextmanager
def open_partial(out: Path, fingerprint: str) -> Iterator[Partial]:
    """Hold OUT.partial for this process. It stays when an interruption leaves finished shards in it, and goes with
    every other error. Raises CheckpointError while another process holds it.
    """
    partial = Partial(out, fingerprint)
    _check_ours(partial.path)
    try:
        partial.path.mkdir(exist_ok=True)
        lock = os.open(partial.path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{partial.path} cannot be written ({error.strerror}); choose another place.") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"Another conversion is writing {out}; wait for it or choose another name.") from None
        with _kept_when_resumable(partial):
            partial.recall()
            yield partial
    finally:
        os.close(lock)


def _check_ours(path: Path) -> None:
    """What a stopped conversion left may be deleted, and nothing else."""
    if not path.exists() and not path.is_symlink():
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() and not path.is_symlink() else {path.name}
    if names and RECORD not in names and not all(name.startswith(UNFINISHED) for name in names):
        raise CheckpointError(f"{path} is in the way and no stopped conversion; move it or choose another name.")


@contextlib.contextmanager
def _kept_when_resumable(partial: Partial) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        if not partial.is_resumable:
            remove(partial.path)
        raise
    except OSError as error:
        remove(partial.path)
        raise CheckpointError(f"Converting to {partial.out} failed ({error}); check the disks and try again.") from None
    except BaseException:
        remove(partial.path)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as `write_whole` does, indented as mlx-lm's are."""
    write_whole(path, json.dumps(content, indent=4) + "\n")


def remove(path: Path) -> None:
    """Delete a file or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
