"""Kept prefixes in a folder, from one run of the server to the next: session files without messages."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.session_file import fingerprint, read_session, write_session
from ...errors import DiffusionGemmaError, PromptError
from ...paths import user_path
from .engine import LOG
from .prefixes import LITTLE

if TYPE_CHECKING:
    from ...model.cache import Cache
    from ...model.diffusion_gemma import DiffusionGemma
    from .prefixes import PrefixPool

NO_MESSAGES: dict[str, Any] = {"system": None, "thinking": False, "messages": []}


class KeptFiles:
    """A folder of prefixes, which hold what users wrote: a new one is its user's alone. Its files may be of several
    models; together they take at most `most_bytes`, and the least recently used go first.

    Raises PromptError where the folder cannot be made.
    """

    def __init__(self, folder: str | Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = user_path(folder), most_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PromptError(f"{self.folder} cannot be a folder ({error.strerror}); name another one.") from None

    def read(self, model: DiffusionGemma, prefixes: PrefixPool) -> None:
        """Add this model's prefixes to those that are kept. What is another's, or damaged, stays where it is."""
        for path in self._paths():
            try:
                _, cache = read_session(path, model)
            except DiffusionGemmaError as error:
                LOG.info("a kept prefix is not used: %s", error)
            else:
                prefixes.restore(cache)

    def write(self, model: DiffusionGemma, prefixes: PrefixPool) -> None:
        """Write the prefixes that are kept, up to where each prompt ended; those that are there already count as used
        again. What cannot be written is left out.
        """
        own = fingerprint(model)
        chosen: list[Cache] = []
        room = self.most_bytes
        for cache in reversed(prefixes.of_prompts()):
            room -= cache.nbytes
            if room < 0:
                break
            if cache.offset > LITTLE:
                chosen.append(cache)
        for cache in reversed(chosen):
            name = hashlib.sha256(json.dumps([own, cache.labels]).encode()).hexdigest()[:16]
            path = self.folder / f"prefix-{name}.safetensors"
            try:
                if path.exists():
                    os.utime(path)
                else:
                    write_session(path, model, NO_MESSAGES, cache)
            except (DiffusionGemmaError, OSError) as error:
                LOG.warning("a prefix cannot be kept: %s", error)
        self._keep_to_the_budget()

    def _paths(self) -> list[Path]:
        """The files of prefixes, least recently used first."""
        return sorted(self.folder.glob("prefix-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)

    def _keep_to_the_budget(self) -> None:
        paths = self._paths()
        total = sum(path.stat().st_size for path in paths)
        for path in paths:
            if total <= self.most_bytes:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
