"""OUT.partial: where a conversion's files wait until all are there, and what a stopped one is resumed from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files import UNFINISHED, sync, write_whole
from .hashes import file_sha256

RECORD = "finished-shards.json"
DOWNLOADS = "source"  # inside OUT.partial: files of the source that are not converted yet


@dataclass(frozen=True)
class Identity:
    """The mark of a conversion. fingerprint: equal where finished shards of one are what the other would write. about:
    the same for a person who has forgotten it.
    """

    fingerprint: str
    about: str


class Partial:
    """The directory beside `out` that becomes it when whole.

    `finished` holds what `finish` was given for every shard that is whole, and survives until the conversion does;
    `damaged` counts those that were, and are written again.
    """

    def __init__(self, out: Path, identity: Identity) -> None:
        self.out = out
        self.path = partial_path(out)
        self.identity = identity
        self.finished: dict[str, dict[str, Any]] = {}
        self.damaged = 0

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
        return bool(self.finished) or _size(self.path / DOWNLOADS) > 0

    def recall(self, restart: bool) -> None:
        """Load the record of an earlier run; delete all that it does not vouch for, with `restart` everything."""
        keep = set()
        record = _read_record(self.path)
        if record and record["fingerprint"] == self.identity.fingerprint and not restart:
            keep = {DOWNLOADS}
            for name, shard in record["shards"].items():
                if _is_whole(self.path / name, shard):
                    self.finished[name] = shard
            self.damaged = len(record["shards"]) - len(self.finished)
        for path in self.path.iterdir():
            if path.name not in keep | set(self.finished):
                remove(path)
        self._save()

    def _save(self) -> None:
        content = {
            "fingerprint": self.identity.fingerprint,
            "about": self.identity.about,
            "shards": self.finished,
        }
        write_json(self.path / RECORD, content)


def partial_path(out: Path) -> Path:
    """OUT.partial."""
    return out.with_name(out.name + ".partial")


def finished_bytes(out: Path) -> int:
    """Count the bytes that a stopped conversion to `out` has finished or downloaded."""
    path = partial_path(out)
    record = _read_record(path)
    # Without a readable record nobody knows which of them are whole.
    names = [path / name for name in record["shards"]] if record else list(path.glob("*.safetensors"))
    return sum(_size(name) for name in [*names, path / DOWNLOADS])


def check_same(out: Path, identity: Identity, restart: bool = False) -> None:
    """Raise CheckpointError where something is in OUT.partial that a conversion may not delete: what another one has
    finished, unless with `restart`, and what is no stopped conversion.
    """
    path = partial_path(out)
    _check_ours(path)
    record, nbytes = _read_record(path), finished_bytes(out)
    if restart or not nbytes or (record and record["fingerprint"] == identity.fingerprint):
        return
    about = record.get("about") if record else None
    what = "whose record cannot be read" if about is None else f"by another version or from other files ({about})"
    if about is not None and about != identity.about:
        what = f"from another source or with other options ({about})"
    raise CheckpointError(
        f"{path} holds {amount(nbytes)} of a stopped conversion {what}; run that one again, give another name, or "
        "--restart to delete them."
    )


@contextlib.contextmanager
def open_partial(out: Path, identity: Identity, *, restart: bool = False) -> Iterator[Partial]:
    """Hold OUT.partial for this process. An error leaves it where finished shards or downloads are in it, and else
    deletes it. restart: begin with an empty one. Raises CheckpointError while another process holds it, and as
    `check_same` does.
    """
    partial = Partial(out, identity)
    _check_ours(partial.path)  # before anything is opened there
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
        check_same(out, identity, restart)
        with _kept_when_resumable(partial):
            partial.recall(restart)
            yield partial
    finally:
        os.close(lock)


def _check_ours(path: Path) -> None:
    """Refuse to delete anything but what a stopped conversion left."""
    if not path.exists() and not path.is_symlink():
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() and not path.is_symlink() else {path.name}
    if names and RECORD not in names and not all(name.startswith(UNFINISHED) for name in names):
        raise CheckpointError(f"{path} is in the way and no stopped conversion; move it or choose another name.")


@contextlib.contextmanager
def _kept_when_resumable(partial: Partial) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not partial.is_resumable:
            remove(partial.path)
        if not isinstance(error, OSError):
            raise
        kept = f", which goes on from {partial.path}" if partial.is_resumable else ""
        raise CheckpointError(
            f"Converting to {partial.out} failed ({error}); check the disks and run the same command again{kept}."
        ) from None


def amount(nbytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record in OUT.partial; None where there is none that can be read."""
    try:
        content = json.loads((path / RECORD).read_text(encoding="utf-8"))
        shards = content["shards"].values()
        return content if content["fingerprint"] and all(shard["sha256"] for shard in shards) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_whole(path: Path, record: dict[str, Any]) -> bool:
    try:
        return bool(file_sha256(path) == record["sha256"])
    except OSError:
        return False


def _size(path: Path) -> int:
    """Bytes of a file or of all files in a directory; 0 where there is none."""
    try:
        if path.is_dir():
            return sum(_size(entry) for entry in path.iterdir())
        return path.stat().st_size
    except OSError:
        return 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as `write_whole` does, indented as mlx-lm's are."""
    write_whole(path, json.dumps(content, indent=4) + "\n")


def remove(path: Path) -> None:
    """Delete a file or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
