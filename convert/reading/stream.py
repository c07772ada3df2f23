"""A hub repository read file by file: each is downloaded when its first tensor is needed and deleted after its last."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...checkpoints.hub import Interrupted
from ...checkpoints.safetensors import Entry
from ..plan import Job
from ..writing.hashes import file_sha256
from . import remote
from .reader import Files
from .sources import Weight

COPY_BYTES = 8 << 20
KEPT = ".kept"


class StreamedFiles(Files):
    """Files of a repository that are on this disk one at a time.

    directory: where they are downloaded to. jobs: all that will be read, in order. hashes: SHA-256 by file name.
    """

    def __init__(
        self, repository: str, commit: str, directory: Path, jobs: Iterable[Job], hashes: Mapping[str, str]
    ) -> None:
        super().__init__(directory)
        self.repository, self.commit, self.hashes = repository, commit, hashes
        self._pending: dict[str, dict[str, list[Entry]]] = {}  # file → weight → what it needs of it
        for job in jobs:
            for entry in job.weight.entries:
                self._pending.setdefault(entry.file, {}).setdefault(job.weight.name, []).append(entry)

        for leftover in directory.glob(f"*{KEPT}"):
            leftover.unlink()

    def provide(self, name: str) -> Path:
        for other in list(self._opened):
            self._shrink(other)
        path = remote.download_file(self.repository, self.commit, name, self.directory)
        known = self.hashes.get(name)
        if known and file_sha256(path) != known:
            path.unlink()
            raise Interrupted(f"{name} arrived damaged: its SHA-256 is not {known}; run the same command again.")
        return path

    def finish(self, weight: Weight) -> None:
        for name in {entry.file for entry in weight.entries}:
            del self._pending[name][weight.name]
            if not self._pending[name]:
                self.close(name)
                for path in (self.directory / name, self.directory / f"{name}{KEPT}"):
                    path.unlink(missing_ok=True)

    def _shrink(self, name: str) -> None:
        """Keep only the bytes of an opened file that are still needed, at their places in a sparse one."""
        path, kept = self.directory / name, self.directory / f"{name}{KEPT}"
        if kept.exists():
            return
        descriptor, data = self._opened[name]
        with kept.open("wb") as file:
            file.truncate(path.stat().st_size)
            for entry in (entry for needed in self._pending[name].values() for entry in needed):
                _copy(descriptor, file.fileno(), data + entry.begin, entry.nbytes)
        os.close(descriptor)
        path.unlink()
        self._opened[name] = os.open(kept, os.O_RDONLY), data


def _copy(source: int, target: int, position: int, count: int) -> None:
    end = position + count
    while position < end:
        block = os.pread(source, min(COPY_BYTES, end - position), position)
        position += os.pwrite(target, block, position)
