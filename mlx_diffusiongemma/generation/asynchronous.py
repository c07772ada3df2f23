"""Replies for `async` code: a worker thread generates, and the event loop gets the events."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from ..events import Commit, Done, Event, Result
from .replying import collect, stream

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..options import GenerationOptions
    from ..processing.processor import Processor
    from .canvas import Canvas
    from .request import PromptLike


async def astream(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    *,
    images: Sequence[Any] = (),
    tools: Sequence[Any] = (),
    thinking: bool = False,
    canvas: Canvas | None = None,
    schema: Any = None,
    grammar: str | None = None,
    tool_choice: str | None = None,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> AsyncGenerator[Event, None]:
    """`stream` for `async for`: the same events, from a worker thread, while the event loop goes on.

    Requests to one model take turns, first come first served, whatever loop they come from; one that still waits can be
    cancelled. Cancelling the task, closing the iterator or leaving the loop over it stops within one step, and what
    the reply held is free again when the cancelled task or `aclose` is done. What `stream` raises is raised here, with
    the first event. The worker does not wait for a slow reader: events queue up, and the next request gets its turn.
    """
    start = partial(
        stream,
        model,
        processor,
        prompt,
        images=images,
        tools=tools,
        thinking=thinking,
        canvas=canvas,
        schema=schema,
        grammar=grammar,
        tool_choice=tool_choice,
        options=options,
        cache=cache,
        max_tokens=max_tokens,
        seed=seed,
        cancel=cancel,
    )
    request = _Request(start)
    line = _line_of(model)
    line.join(request)
    item: Event | _Over | None = None
    try:
        while not isinstance(item := await request.items.get(), _Over):
            yield item
    finally:
        if not line.leave(request) and not request.loop.is_closed():
            while not isinstance(item, _Over):
                item = await request.items.get()
            if item.thread:
                item.thread.join()  # it has nothing left to do
    if item.error:
        try:
            raise item.error
        finally:
            # Or the error would hold this frame, and so itself and what the reply held, until the next collection.
            del request, item, start


async def agenerate(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    *,
    images: Sequence[Any] = (),
    tools: Sequence[Any] = (),
    thinking: bool = False,
    canvas: Canvas | None = None,
    schema: Any = None,
    grammar: str | None = None,
    tool_choice: str | None = None,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> Result:
    """`astream`, to the end: the whole reply. Cancelling the task stops within one step."""
    events = astream(
        model,
        processor,
        prompt,
        images=images,
        tools=tools,
        thinking=thinking,
        canvas=canvas,
        schema=schema,
        grammar=grammar,
        tool_choice=tool_choice,
        options=options,
        cache=cache,
        max_tokens=max_tokens,
        seed=seed,
        cancel=cancel,
    )
    async with aclosing(events):
        return collect([event async for event in events if isinstance(event, Commit | Done)])


class _Over(NamedTuple):
    """The end of a request: what `stream` raised, and the worker thread where it ends as well."""

    error: BaseException | None
    thread: threading.Thread | None


class _Request:
    """One reply to make, and the way its events take from the worker thread to the event loop that waits for them."""

    def __init__(self, start: Callable[[], Generator[Event, None, None]]) -> None:
        self.start = start
        self.items: asyncio.Queue[Event | _Over] = asyncio.Queue()
        self.left = False  # nobody waits for it any more
        self.loop = asyncio.get_running_loop()

    def run(self) -> BaseException | None:
        """Generate the reply, and return what went wrong."""
        try:
            with closing(self.start()) as events:
                while not self.left and (event := next(events, None)) is not None:
                    self.hand_over(event)
        except BaseException as error:
            return error
        return None

    def hand_over(self, item: Event | _Over) -> None:
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:  # the event loop is closed
            self.left = True


class _Line:
    """The requests to one model, the one at work first.

    A thread serves them and ends with the last of them. MLX gives each thread that computes a stream of its own, and
    on a CPU the thread behind that stream outlives the one it was made for; so all of them compute on one stream.
    """

    def __init__(self) -> None:
        self._requests: deque[_Request] = deque()
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())

    def __deepcopy__(self, memo: dict[int, object]) -> _Line:
        return _Line()  # another model's

    def join(self, request: _Request) -> None:
        with _changing_lines:
            if not self._requests:
                threading.Thread(target=self._serve, name="mlx-diffusiongemma").start()
            self._requests.append(request)

    def leave(self, request: _Request) -> bool:
        """Give up a request, and say whether it is gone; else it is at work, and stops within one step."""
        with _changing_lines:
            request.left = True
            waits = request in self._requests and request is not self._requests[0]
            if waits:
                self._requests.remove(request)
            return waits

    def _serve(self) -> None:
        mx.set_default_stream(self._stream)
        going = True
        while going:
            with _changing_lines:
                request = self._requests[0]
            error = request.run()
            with suppress(RuntimeError):  # of a step that nobody reads
                mx.synchronize(self._stream)  # one that was left is still under way, and holds memory
            with _changing_lines:
                self._requests.popleft()
                going = bool(self._requests)
            request.hand_over(_Over(error, None if going else threading.current_thread()))
            del request, error


_changing_lines = threading.Lock()


def _line_of(model: DiffusionGemma) -> _Line:
    """The model's line, which is kept on the model and goes with it."""
    with _changing_lines:
        line = getattr(model, "_line", None)
        if line is None:
            line = model._line = _Line()
        return line
