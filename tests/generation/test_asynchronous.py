"""`astream` and `agenerate`: the events of `stream`, in turn, cancelled within a step, and nothing left behind."""

import asyncio
import copy
import gc
import os
import threading
import time
import weakref
from contextlib import aclosing
from dataclasses import replace
from inspect import signature
from pathlib import Path

import mlx.core as mx
import pytest
from scripted import ByteProcessor, ScriptedModel, sure, unsure

from mlx_diffusiongemma import (
    CanvasError,
    Commit,
    Done,
    Draft,
    Prefill,
    PromptError,
    agenerate,
    astream,
    generate,
    load,
    stream,
)

LENGTH = 8


THERE: set[threading.Thread] = set()  # before a test, which other tests of the process may have left running


@pytest.fixture(autouse=True)
def there_before():
    THERE.clear()
    THERE.update(threading.enumerate())


def started() -> list[threading.Thread]:
    """The threads that the test has started and that still run."""
    return [thread for thread in threading.enumerate() if thread not in THERE]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def scripted(*steps):
    """A model that finds these logits; they are computed here, for MLX computes in the thread that asked."""
    script = [step[None] for step in steps]
    mx.eval(script)
    return ScriptedModel(script, LENGTH)


def endless(steps=10_000):
    """A model that is never sure: its reply to one canvas takes `steps` denoising steps."""
    model = scripted(unsure(LENGTH))
    model.options = replace(model.options, max_steps=steps)
    return model


def watched(model):
    """A scripted model that says which prompts it reads, in order, and can be held up in the midst of a step."""
    model.read, model.goes_on, model.in_step = [], threading.Event(), threading.Event()
    model.goes_on.set()
    encode, denoise = model.encode, model.denoise

    def encode_and_note(tokens, cache, **rest):
        model.read.append(bytes(tokens[0].tolist()).decode())
        return encode(tokens, cache, **rest)

    def denoise_when_let(*arguments):
        model.in_step.set()
        assert model.goes_on.wait(60)
        return denoise(*arguments)

    model.encode, model.denoise = encode_and_note, denoise_when_let
    return model


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def all_of(events):
    return [event async for event in events]


def timeless(events):
    """Events without what the clock and the memory say."""
    last = events[-1]
    stats = replace(last.stats, prompt_seconds=0, denoise_seconds=0, peak_memory_bytes=0)
    return [*events[:-1], replace(last, stats=stats)]


def test_the_parameters_are_those_of_stream():
    assert signature(astream).parameters == signature(stream).parameters == signature(agenerate).parameters


@pytest.mark.parametrize("prompt", ["reverse canvas", "json name=ada age=36", "count from 17"])
def test_events_are_those_of_stream(demo, prompt):
    assert timeless(asyncio.run(all_of(astream(*demo, prompt, seed=3)))) == timeless([*stream(*demo, prompt, seed=3)])


def test_the_result_is_that_of_generate(demo):
    result, expected = asyncio.run(agenerate(*demo, "sort 53142", seed=1)), generate(*demo, "sort 53142", seed=1)
    assert str(result) == "12345" and result.tokens == expected.tokens and result.stats.steps == expected.stats.steps


def test_a_kept_cache_serves_both_kinds_of_caller(demo):
    model, _ = demo
    cache = model.make_cache()
    first = asyncio.run(agenerate(*demo, "reverse canvas", seed=0, cache=cache))
    second = generate(*demo, "reverse canvas", seed=0, cache=cache)
    third = asyncio.run(agenerate(*demo, "reverse canvas", seed=0, cache=cache))
    assert first.text == second.text == third.text == "savnac"
    assert first.stats.cached_tokens == 0 < second.stats.cached_tokens == third.stats.cached_tokens


def test_the_event_loop_goes_on_meanwhile():
    """While a step takes its time, other tasks run, and events come one by one rather than at the end."""
    model = watched(scripted(unsure(LENGTH), sure("hello", LENGTH)))

    async def main():
        model.goes_on.clear()
        events = astream(model, ByteProcessor(), "hi", seed=1)
        assert type(await anext(events)) is Prefill
        waiting = asyncio.ensure_future(anext(events))
        await until(model.in_step.is_set)
        await asyncio.sleep(0)
        assert not waiting.done()
        model.goes_on.set()
        assert type(await waiting) is Draft
        rest = await all_of(events)
        assert type(rest[-1]) is Done and "".join(e.text for e in rest if isinstance(e, Commit)) == "hello"

    asyncio.run(main())


def test_cancelling_the_task_stops_within_a_step_and_frees_what_it_held():
    model = watched(endless())

    async def main():
        task = asyncio.create_task(agenerate(model, ByteProcessor(), "q"))
        await until(lambda: len(model.canvases) > 3)
        model.goes_on.clear()
        model.in_step.clear()
        await until(model.in_step.is_set)
        task.cancel()  # in the midst of a step
        await asyncio.sleep(0.01)
        begun = len(model.canvases)
        assert not task.done()
        model.goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The step that was under way, and the one that is built while it runs.
        assert len(model.canvases) <= begun + 2
        assert model.caches[0].released == 1 and not started()

    asyncio.run(main())


def test_cancelling_frees_the_memory(demo):
    model, processor = demo
    options = replace(model.options, max_steps=10_000, stability=9_999, max_tokens=4096)
    generate(*demo, "count from 17", seed=0)
    gc.collect()
    before = mx.get_active_memory()

    async def main():
        events = astream(model, processor, "count from 17 " * 8, options=options, seed=0)
        drafts = 0
        async for event in events:
            drafts += isinstance(event, Draft)
            if drafts == 3:
                break
        assert mx.get_active_memory() > before
        await events.aclose()
        # No collection: nothing may wait for one.
        assert mx.get_active_memory() <= before + 1024

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_leaving_the_loop_over_it_stops_it():
    """Without `aclose`: Python closes an iterator that nobody holds any more."""
    model = endless()

    async def main():
        async for event in astream(model, ByteProcessor(), "q"):
            if isinstance(event, Draft):
                break
        await until(lambda: not started())
        assert model.caches[0].released == 1 and len(model.canvases) < 10_000

    asyncio.run(main())


def test_a_loop_that_ends_stops_it():
    """`asyncio.run` closes what is open when it ends; a loop that is closed without that stops the worker as well."""
    model = endless()
    held = []

    async def begin():
        held[:] = [astream(model, ByteProcessor(), "q")]
        while type(await anext(held[0])) is not Draft:
            pass

    asyncio.run(begin())
    assert not started()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    for thread in started():
        thread.join(60)
    assert [cache.released for cache in model.caches] == [1, 1]
    asyncio.run(held[0].aclose())  # from another loop: there is nothing to wait for any more


def test_the_thread_is_gone_when_the_reply_is_there():
    model = scripted(sure("ok", LENGTH))

    async def main():
        for _ in range(300):
            await agenerate(model, ByteProcessor(), "q")
            assert not started()

    asyncio.run(main())


def test_requests_take_turns_in_the_order_they_came():
    model = watched(scripted(sure("ok", LENGTH)))
    prompts = ["first", "second", "third"]

    async def main():
        order = []

        async def ask(prompt):
            async for event in astream(model, ByteProcessor(), prompt):
                order.append((prompt, type(event).__name__))

        await asyncio.gather(*map(ask, prompts))
        return order

    order = asyncio.run(main())
    assert model.read == prompts
    assert order == [(prompt, name) for prompt in prompts for name in ("Prefill", "Draft", "Draft", "Commit", "Done")]


def test_two_at_once_give_the_texts_that_each_gives_alone(demo):
    async def main():
        return await asyncio.gather(
            agenerate(*demo, "reverse canvas", seed=0),
            all_of(astream(*demo, "sort 312", seed=0)),
            agenerate(*demo, "how is lima today?", seed=0),
        )

    first, events, third = asyncio.run(main())
    assert first.text == "savnac" and "".join(e.text for e in events if isinstance(e, Commit)) == "123"
    assert third.text == generate(*demo, "how is lima today?", seed=0).text


def test_loops_in_two_threads_share_a_model(demo):
    texts = {}

    def own_loop(prompt):
        texts[prompt] = [asyncio.run(agenerate(*demo, prompt, seed=0)).text for _ in range(3)]

    threads = [threading.Thread(target=own_loop, args=(prompt,)) for prompt in ("reverse canvas", "sort 312")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {"reverse canvas": ["savnac"] * 3, "sort 312": ["123"] * 3}


def test_one_that_waits_can_be_cancelled():
    model = watched(endless(steps=20))

    async def main():
        model.goes_on.clear()
        first, second, third = (
            asyncio.create_task(agenerate(model, ByteProcessor(), prompt, max_tokens=LENGTH))
            for prompt in ("first", "second", "third")
        )
        await until(model.in_step.is_set)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second  # at once: the first is still in its step
        assert not first.done()
        model.goes_on.set()
        await asyncio.gather(first, third)
        assert model.read == ["first", "third"]

    asyncio.run(main())


def test_cancelling_one_lets_the_next_have_its_turn(demo):
    async def main():
        first = asyncio.create_task(agenerate(*demo, "count from 17", seed=0))
        second = asyncio.create_task(agenerate(*demo, "reverse canvas", seed=0))
        await asyncio.sleep(0.05)
        first.cancel()
        assert (await second).text == "savnac"

    asyncio.run(main())


def test_a_reader_that_asks_the_same_model_waits_for_nobody():
    """The first reply's reader reads no further until the second reply is there: a worker that waited would hang."""
    model = scripted(sure("ok", LENGTH))

    async def main():
        texts = []
        async with asyncio.timeout(60):
            async for event in astream(model, ByteProcessor(), "one"):
                if isinstance(event, Prefill):
                    texts.append((await agenerate(model, ByteProcessor(), "two")).text)
                texts += [event.text] if isinstance(event, Commit) else []
        return texts

    assert asyncio.run(main()) == ["ok", "ok"]


def test_the_callers_cancel_ends_the_reply_as_it_ends_streams():
    cancel, model = threading.Event(), endless()

    async def main():
        events = []
        async for event in astream(model, ByteProcessor(), "q", cancel=cancel):
            events.append(event)
            if isinstance(event, Draft):
                cancel.set()
        return events

    assert asyncio.run(main())[-1].finish_reason == "cancelled"


def test_errors_arrive_in_the_task_that_waits():
    model = scripted(sure("ok", LENGTH))
    with pytest.raises(PromptError, match="The prompt is empty"):
        asyncio.run(agenerate(model, ByteProcessor(), ""))
    with pytest.raises(PromptError, match="max_tokens"):
        asyncio.run(all_of(astream(model, ByteProcessor(), "q", max_tokens=0)))
    assert asyncio.run(agenerate(model, ByteProcessor(), "q")).text == "ok"


def test_an_error_in_the_midst_comes_after_the_events_before_it():
    model = watched(endless())
    failing = model.denoise

    def fail_later(*arguments):
        if len(model.canvases) > 2:
            raise CanvasError("broken")
        return failing(*arguments)

    model.denoise = fail_later

    async def main():
        events = []
        with pytest.raises(CanvasError, match="broken"):
            async for event in astream(model, ByteProcessor(), "q"):
                events.append(type(event))
        assert events[0] is Prefill and Draft in events and not started()
        model.denoise = failing
        model.options = replace(model.options, max_steps=2)
        assert (await agenerate(model, ByteProcessor(), "q", max_tokens=4)).finish_reason == "length"

    asyncio.run(main())


def test_an_error_holds_nothing_once_it_is_dealt_with(demo):
    """No reference cycle: what a failed reply held is free without a collection."""

    class Witness(list):
        """A prompt that is noticed when it goes."""

    gone = []

    async def main():
        prompt = Witness()
        weakref.finalize(prompt, gone.append, True)
        with pytest.raises(PromptError):
            await agenerate(*demo, prompt)

    gc.disable()
    try:
        asyncio.run(main())
        assert gone
    finally:
        gc.enable()


def test_many_requests_leave_no_thread_of_mlx():
    """MLX gives a thread that computes a stream, and on a CPU a thread behind it that never ends."""
    if not Path("/proc/self/task").exists():
        pytest.skip("only Linux lists a process's threads in /proc")
    model = scripted(sure("ok", LENGTH))
    asyncio.run(agenerate(model, ByteProcessor(), "q"))
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        asyncio.run(agenerate(model, ByteProcessor(), "q"))
    time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) <= before


def test_a_model_that_has_answered_can_be_copied(demo):
    model, processor = demo
    asyncio.run(agenerate(*demo, "sort 312", seed=0))
    assert asyncio.run(agenerate(copy.deepcopy(model), processor, "sort 312", seed=0)).text == "123"


def test_an_iterator_that_is_never_read_starts_nothing():
    model = endless()

    async def main():
        async with aclosing(astream(model, ByteProcessor(), "q")):
            assert not started()

    asyncio.run(main())
    assert not model.canvases
