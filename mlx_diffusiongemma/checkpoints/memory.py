"""The memory that this machine has for a model, and the limits that a loaded model sets for itself."""

from __future__ import annotations

import os
import threading
import warnings
from typing import ClassVar
from weakref import WeakSet

import mlx.core as mx

from ..errors import CheckpointError, MemoryWarning
from .accounting import CONTEXT, memory_needed
from .checkpoint import Checkpoint

# Freed buffers that MLX keeps for the next request. Without a limit they pile up over requests of mixed lengths.
CACHE_LIMIT = 2**30


def usable_bytes() -> int:
    """Memory that a model can use here: the GPU's working-set limit on a Mac, else the machine's memory."""
    on_gpu = mx.default_device() == mx.gpu
    limit = mx.device_info().get("max_recommended_working_set_size") if on_gpu else None
    return int(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def check_fits(checkpoint: Checkpoint) -> None:
    """Compare what the model needs (its weights, a prefix's K/V, one step) with what there is.

    Warns where a prefix of 8,192 tokens does not fit; raises CheckpointError where not even a short one does.
    """
    limit, directory = usable_bytes(), checkpoint.directory
    least, comfortable = (
        memory_needed(checkpoint.config, checkpoint.nbytes, context, checkpoint.item).total for context in (1, CONTEXT)
    )
    raising = f"raise the GPU's limit (sudo sysctl iogpu.wired_limit_mb={-(-comfortable // 2**20)})"
    if least > limit:
        raise CheckpointError(
            f"{directory} needs {least / 1e9:.1f} GB to run, and {limit / 1e9:.1f} GB can be used here; convert with "
            f"fewer bits (mlx-dg convert --recipe small), or on a Mac with more memory {raising}."
        )
    if comfortable > limit:
        warnings.warn(
            f"{directory} needs {comfortable / 1e9:.1f} GB with {CONTEXT:,} tokens of context, and "
            f"{limit / 1e9:.1f} GB can be used here: keep prompts short, or on a Mac with more memory {raising}.",
            MemoryWarning,
            stacklevel=3,
        )


def set_limits() -> None:
    """Bound what MLX keeps of freed memory, and where there is a working-set limit, keep the model resident in it."""
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    mx.set_cache_limit(CACHE_LIMIT)
    maybe_set_recommended_wired_limit()


class PeakMemory:
    """The most bytes that MLX has held since this was made, also while other requests measure theirs.

    MLX keeps one peak for the whole process. Who begins to measure resets it, and first lets all others take it in.
    """

    _measuring: ClassVar[WeakSet[PeakMemory]] = WeakSet()
    _lock: ClassVar[threading.RLock] = threading.RLock()  # a request that is collected meanwhile stops its own

    def __init__(self) -> None:
        self._bytes = 0
        with self._lock:
            self._take_in()
            mx.reset_peak_memory()
            self._measuring.add(self)

    def stop(self) -> int:
        """The peak in bytes; what comes later is no part of it."""
        with self._lock:
            self._take_in()
            self._measuring.discard(self)
        return self._bytes

    @classmethod
    def _take_in(cls) -> None:
        for own in list(cls._measuring):
            own._bytes = max(own._bytes, mx.get_peak_memory())
