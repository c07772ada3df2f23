"""Jobs that wait for the model, each caller's in order, and callers in turn."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ...events import Draft, Event, Result

if TYPE_CHECKING:
    from ...model.cache import Cache
    from ...model.diffusion_gemma import DiffusionGemma
    from ...processing.processor import Processor, Prompt

MOST_WAITING_ITEMS = 64  # of a reader that is slower than the model; beyond, drafts are left out

Item = Event | Result


class Turn(NamedTuple):
    """The things that a job works with, on the engine's thread."""

    model: DiffusionGemma
    processor: Processor
    cache: Cache
    cancel: threading.Event


class Over(NamedTuple):
    """The last item of a job, with what went wrong, if anything."""

    error: BaseException | None


@dataclass(eq=False)
class Job:
    """Work for the model, and the way of its events to the event loop that waits for them.

    work: yields events, and of what is no stream of them the result. prompt: what is read first, to find its prefix.
    caller: whose turn it takes. drafts: whether drafts are of interest. slot: a place where a new job of the same
    caller replaces one that still waits. urgent: it may run between two canvases of another job.
    """

    work: Callable[[Turn], Generator[Item, None, None]]
    prompt: Prompt
    caller: str
    drafts: bool = False
    slot: str | None = None
    urgent: bool = False
    cancel: threading.Event = field(default_factory=threading.Event)
    items: asyncio.Queue[Item | Over] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def hand_over(self, item: Item | Over) -> None:
        """Give an item to the event loop, from any thread."""
        if isinstance(item, Draft) and not (self.drafts and self.items.qsize() < MOST_WAITING_ITEMS):
            return
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:  # the event loop is closed
            self.cancel.set()


class FairQueue:
    """Waiting jobs: callers take turns, and a caller's jobs run in the order they came. Not for two threads at once."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, job: Job) -> None:
        self._lines.setdefault(job.caller, deque()).append(job)

    def remove(self, job: Job) -> bool:
        """Take a job out; False where it does not wait here."""
        line = self._lines.get(job.caller, ())
        if job not in line:
            return False
        self._lines[job.caller].remove(job)
        self._drop_if_empty(job.caller)
        return True

    def pop(self, urgent: bool = False) -> Job | None:
        """Take out the job whose turn it is. urgent: of those that may run between others' canvases."""
        for caller, line in self._lines.items():
            job = next((job for job in line if job.urgent), None) if urgent else line[0]
            if job is not None:
                line.remove(job)
                self._lines.move_to_end(caller)
                self._drop_if_empty(caller)
                return job
        return None

    def in_slot(self, job: Job) -> Job | None:
        """The waiting job that this one replaces."""
        line = self._lines.get(job.caller, ())
        return next((other for other in line if job.slot is not None and other.slot == job.slot), None)

    def _drop_if_empty(self, caller: str) -> None:
        if not self._lines[caller]:
            del self._lines[caller]
