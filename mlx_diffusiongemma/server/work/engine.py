"""One model and many callers: a thread that works through a fair queue, and the prefixes that it keeps."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import mlx.core as mx

from ...checkpoints.memory import usable_bytes
from ...events import Commit, Done, Result
from ..refusals import Refusal
from .metrics import Metrics
from .prefixes import PrefixPool
from .waiting import FairQueue, Item, Job, Over, Turn

if TYPE_CHECKING:
    from ...model.diffusion_gemma import DiffusionGemma
    from ...processing.processor import Processor
    from .kept_files import KeptFiles

LOG = logging.getLogger("mlx_diffusiongemma.server")
LONGEST_WAIT = 60  # seconds that a caller is asked to wait at most
SHARE = 4  # of the memory beside the weights, one part in so many is for kept prefixes

T = TypeVar("T")


class Loaded(NamedTuple):
    """The model, and what belongs to it."""

    model: DiffusionGemma
    processor: Processor
    prefixes: PrefixPool


class Engine:
    """Runs jobs on one model, one at a time, on a thread of its own.

    load: gives the model and its processor, on that thread. queue: most jobs that wait. kept_bytes: what kept prefixes
    may take; None is a quarter of the memory beside the weights. kept_files: where they are from one run to the next.
    """

    def __init__(
        self,
        load: Callable[[], tuple[DiffusionGemma, Processor]],
        *,
        queue: int = 32,
        kept_bytes: int | None = None,
        kept_files: KeptFiles | None = None,
    ) -> None:
        self.metrics = Metrics()
        self.state: Literal["loading", "ready", "closing"] = "loading"
        self.error: BaseException | None = None  # why the model could not be loaded
        self._load, self._most_waiting, self._kept_bytes = load, queue, kept_bytes
        self._kept_files = kept_files
        self._loaded: Loaded | None = None
        self._queue = FairQueue()
        self._running: list[Job] = []  # the last one is at work, between two canvases of the others
        self._changed = threading.Condition()
        # A daemon, so that a download need not end before the process does.
        self._worker = threading.Thread(target=self._serve, name="mlx-diffusiongemma-server", daemon=True)
        self._preparing = ThreadPoolExecutor(1, "mlx-diffusiongemma-prompts")

    def start(self) -> None:
        """Begin to load the model."""
        self._worker.start()

    @property
    def loaded(self) -> Loaded:
        """The model. Raises Refusal where it is not there yet, or not any more."""
        if self.state == "closing":
            raise closing_down()
        if self._loaded is None:
            raise Refusal("The model is still being loaded; try again in a few seconds.", 503, retry_after=5)
        return self._loaded

    def check_open(self) -> None:
        """Raises Refusal where nothing is answered yet, or any more."""
        _ = self.loaded

    @property
    def gauges(self) -> dict[str, int]:
        """The figures of this moment, for `Metrics.text`."""
        prefixes = self._loaded.prefixes if self._loaded else ()
        return {
            "queue": len(self._queue),
            "prefixes": len(prefixes),
            "prefix_bytes": prefixes.nbytes if isinstance(prefixes, PrefixPool) else 0,
            "memory_bytes": mx.get_active_memory(),
        }

    async def prepare(self, make: Callable[[], T]) -> T:
        """Run what takes a while and needs no model, such as making a prompt, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, make)

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn. Raises Refusal where there is no room for it, or no model."""
        with self._changed:
            self.check_open()
            if replaced := self._queue.in_slot(job):
                self._queue.remove(replaced)
                replaced.hand_over(Over(Refusal("A newer completion has taken this one's place.", 409)))
            if len(self._queue) >= self._most_waiting:
                wait = math.ceil(self.metrics.seconds_per_job * (len(self._queue) + 1))
                raise Refusal(
                    f"{len(self._queue)} requests wait already; try again later.",
                    429,
                    code="queue_full",
                    retry_after=min(max(wait, 1), LONGEST_WAIT),
                )
            self._queue.add(job)
            self._changed.notify()

    async def items(self, job: Job) -> AsyncGenerator[Item, None]:
        """Give what a submitted job yields. Closing this stops it within one step, or takes it out of the queue."""
        try:
            while not isinstance(item := await job.items.get(), Over):
                yield item
            if item.error:
                raise item.error
        finally:
            self.leave(job)

    def leave(self, job: Job) -> None:
        """Give a job up: nobody waits for it any more."""
        job.cancel.set()
        with self._changed:
            self._queue.remove(job)

    def close(self) -> None:
        """Stop within one step: what runs is cancelled, what waits and what comes now is refused."""
        with self._changed:
            self.state = "closing"
            while job := self._queue.pop():
                job.hand_over(Over(closing_down()))
            for job in self._running:
                job.cancel.set()
            self._changed.notify()
        self._preparing.shutdown(wait=False)

    def join(self) -> None:
        """Wait for the thread, once the engine is closed; a model that is still being loaded is not waited for."""
        if self._loaded:
            self._worker.join()

    def _serve(self) -> None:
        try:
            model, processor = self._load()
            kept = (usable_bytes() - mx.get_active_memory()) // SHARE if self._kept_bytes is None else self._kept_bytes
            prefixes = PrefixPool(model, kept)
            if self._kept_files:
                self._kept_files.read(model, prefixes)
        except BaseException as error:
            self.error = error
            self.state = "closing"
            return
        with self._changed:
            self._loaded = Loaded(model, processor, prefixes)
            if self.state == "loading":
                self.state = "ready"
        while (job := self._next()) is not None:
            self._run(job, self._loaded)
            del job
        if self._kept_files:
            self._kept_files.write(model, prefixes)
        prefixes.clear()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) or self.state == "closing")
            return self._begun(self._queue.pop())

    def _begun(self, job: Job | None) -> Job | None:
        if job:
            self._running.append(job)
        return job

    def _run(self, job: Job, loaded: Loaded) -> None:
        """Run a job to its end, whatever goes wrong in it."""
        error: BaseException | None = None
        try:
            self._work_on(job, loaded)
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # of a step that nobody reads
            mx.synchronize()  # one that was left is still under way, and holds memory
        with self._changed:
            self._running.remove(job)
            if self.state == "closing" and job.cancel.is_set():
                error = closing_down()
        job.hand_over(Over(error))

    def _work_on(self, job: Job, loaded: Loaded) -> None:
        cache = loaded.prefixes.take(job.prompt)
        try:
            with closing(job.work(Turn(loaded.model, loaded.processor, cache, job.cancel))) as items:
                for item in items:
                    if isinstance(item, Done | Result):
                        self.metrics.worked(item.stats)
                    job.hand_over(item)
                    if isinstance(item, Commit) and not job.urgent:
                        self._run_urgent(loaded)
        finally:
            loaded.prefixes.keep(cache, job.prompt)

    def _run_urgent(self, loaded: Loaded) -> None:
        """Run what may come between two canvases of another job."""
        while True:
            with self._changed:
                job = self._begun(self._queue.pop(urgent=True))
            if job is None:
                return
            self._run(job, loaded)


def closing_down() -> Refusal:
    return Refusal("The server is closing; start it again.", 503, retry_after=5)
