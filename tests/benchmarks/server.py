"""The server under strange requests, many callers and official clients, and what it costs beside the library.

    python tests/benchmarks/server.py schemathesis [--count 20]      # pip install schemathesis
    python tests/benchmarks/server.py callers [--count 300 --left 90]
    python tests/benchmarks/server.py forms [--count 200]
    python tests/benchmarks/server.py overhead [--count 40]
    [--checkpoint DIRECTORY]

schemathesis: requests made up from the OpenAPI description, --count for each address and way of making them up: none
may be answered with 5xx. callers: mixed requests, 8 at a time, some of whose callers leave at random moments: every
whole reply must be the library's with that seed, and no thread, lock, prefix or memory may be left behind. forms:
`client.chat.completions.parse` of OpenAI's client with nested Pydantic models and strict tools: every reply must be
valid. overhead: pairs of the same reply from the library and from the server, in turns, medians of their differences.

Without a checkpoint, the demo's is converted first, to float32: a CPU is slow at bfloat16. Exits 1 where a bound is
broken.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import httpx
import mlx.core as mx
import openai
from pydantic import BaseModel, Field

sys.path.insert(0, str(Path(__file__).parent.parent))
from convert_data import DEMO
from many_requests import Failures
from servers import Running, data_of, loader, running, user

from mlx_diffusiongemma import GenerationOptions, Hole, choose, edit, generate, infill
from mlx_diffusiongemma.convert import convert_checkpoint

CHAT = "/v1/chat/completions"
AT_ONCE = 8
WARM_UP = 100  # requests, after which memory may not grow
KEPT_BYTES = 20_000_000  # less than the requests' prefixes need, so that some are dropped all the time
RULES = {"role": "system", "content": "Answer in one line, and say nothing else. " * 4}
WEATHER = {
    "name": "get_weather",
    "description": "Get weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
}


class Question(NamedTuple):
    """A request, how its answer is read, and what the library answers. is_stream: the answer is a list of events."""

    path: str
    body: dict[str, Any]
    read: Callable[[Any], Any]
    own: Callable[[], Any]
    is_stream: bool = False


def questions(server: Running) -> list[Question]:
    """Questions to every interface and decoder."""
    model, processor, _ = server.engine.loaded

    def chat(text: str, seed: int, **more: Any) -> Question:
        own_names = ("decoder", "temperature", "max_tokens", "max_steps")
        options = GenerationOptions(**{name: more[name] for name in own_names if name in more}, seed=seed)
        messages = [RULES, *user(text)] if seed % 2 else user(text)
        body = {"messages": messages, "seed": seed, **more}
        return Question(CHAT, body, _content, lambda: generate(model, processor, messages, options=options).text)

    def streamed(question: Question) -> Question:
        return question._replace(body={**question.body, "stream": True}, read=_joined_deltas, is_stream=True)

    def in_form(seed: int) -> Question:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        messages = user("json name=bob age=12")
        body = {"messages": messages, "seed": seed, "response_format": form}
        return Question(
            CHAT, body, _content, lambda: generate(model, processor, messages, schema=PERSON, seed=seed).text
        )

    def calling(seed: int, strict: bool) -> Question:
        tools = [{"type": "function", "function": {**WEATHER, "strict": strict}}]
        messages = user(f"how is {('lima', 'oslo', 'rome')[seed % 3]} today?")
        body = {"messages": messages, "tools": tools, "seed": seed}
        return Question(CHAT, body, _arguments, lambda: _own_arguments(messages, tools, seed))

    def _own_arguments(messages: Any, tools: Any, seed: int) -> list[Any]:
        return [call.arguments for call in generate(model, processor, messages, tools=tools, seed=seed).tool_calls]

    def middle(path: str, seed: int, names: tuple[str, str, str], read: Callable[[Any], Any]) -> Question:
        before, after = "12 13 14 ", f" 17 18 {seed}"
        body = {**dict(zip(names, (before, after, 6), strict=True)), "seed": seed, "max_steps": 4}
        options = GenerationOptions(seed=seed, max_steps=4)
        return Question(
            path, body, read, lambda: infill(model, processor, [before, Hole(6), after], options=options).holes[0]
        )

    def editing(seed: int) -> Question:
        text, instruction = "é 123 321 é", "reverse 123"
        body = {"input": text, "span": [2, 5], "instruction": instruction, "strength": 1, "seed": seed, "max_steps": 2}
        options = GenerationOptions(seed=seed, max_steps=2)
        return Question(
            "/v1/edits",
            body,
            lambda reply: reply["choices"][0]["text"],
            lambda: edit(model, processor, text, (2, 5), instruction, 1, options).text,
        )

    def continuing(seed: int) -> Question:
        options = GenerationOptions(seed=seed, max_tokens=8)
        body = {"prompt": "abc", "max_tokens": 8, "seed": seed}
        prompt = processor.raw_prompt("abc")
        return Question(
            "/v1/completions",
            body,
            lambda reply: reply["choices"][0]["text"],
            lambda: generate(model, processor, prompt, options=options).text,
        )

    def deciding(seed: int) -> Question:
        body = {"state": "sort 21", "questions": {"it": {"type": "choice", "criteria": {"12": None, "21": None}}}}
        said = "sort 21\n\nAnswer with one of these alone:\n- 12\n- 21"
        return Question(
            "/v1/decisions",
            {**body, "seed": seed},
            lambda reply: _rounded(reply["answers"]["it"]["probabilities"]),
            lambda: _rounded(choose(model, processor, said, ["12", "21"], seed=seed)),
        )

    def elsewhere(path: str, seed: int) -> Question:
        messages = user(f"reverse {'abcdefgh'[seed % 5 :]}")
        named = {"input": messages} if path == "/v1/responses" else {"messages": messages, "max_tokens": 50}
        read = _response_text if path == "/v1/responses" else _message_text
        own = GenerationOptions(seed=seed, max_tokens=50)
        return Question(
            path, {**named, "seed": seed}, read, lambda: generate(model, processor, messages, options=own).text
        )

    made: list[Question] = []
    for seed in range(4):
        made += [
            chat(f"reverse {'abcdefgh'[seed:]}", seed),
            streamed(chat(f"count from {17 + seed}", seed)),
            streamed(chat("count from 3", seed, max_tokens=200)),
            chat("sort 4231", seed, decoder="autoregressive", temperature=0.7, max_tokens=8),
            chat("sort 4231", seed, decoder="speculative", temperature=0.7, max_tokens=8),
            in_form(seed),
            calling(seed, strict=False),
            calling(seed, strict=True),
            middle("/v1/fim/completions", seed, ("prompt", "suffix", "max_tokens"), _content),
            middle("/infill", seed, ("input_prefix", "input_suffix", "n_predict"), lambda reply: reply["content"]),
            editing(seed),
            continuing(seed),
            deciding(seed),
            elsewhere("/v1/responses", seed),
            elsewhere("/v1/messages", seed),
        ]
    return made


def _content(reply: Any) -> Any:
    return reply["choices"][0]["message"]["content"]


def _arguments(reply: Any) -> list[Any]:
    calls = reply["choices"][0]["message"].get("tool_calls", [])
    return [json.loads(call["function"]["arguments"]) for call in calls]


def _joined_deltas(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def _response_text(reply: Any) -> str:
    messages = [item for item in reply["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in messages for part in item["content"])


def _message_text(reply: Any) -> str:
    return "".join(block["text"] for block in reply["content"] if block["type"] == "text")


def _rounded(probabilities: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in probabilities.items()}


def check_strange_requests(directory: Path, count: int, failures: Failures) -> None:
    options = GenerationOptions(max_tokens=16, max_steps=2)
    with running(loader(directory), options=options) as server:
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"),
            *("--phases", "examples,coverage,fuzzing", "--checks", "not_a_server_error", "--continue-on-failure"),
            *("--max-examples", str(count), "--seed", "1", "--request-timeout", "300", "--warnings", "off"),
            *("--suppress-health-check", "all"),
        ]
        with tempfile.TemporaryDirectory() as own:  # where it puts its cache
            subprocess.run(command, check=False, cwd=own)
        statuses = Counter[int]()
        for (_, status), number in server.engine.metrics._requests.items():
            statuses[status] += number
        alive = server.http.get("/health").status_code
    print("     answers:", ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items())))
    broken = sum(number for status, number in statuses.items() if status >= 500)
    failures.check(f"of {sum(statuses.values())} answers, those of 500 and above", broken, 0, "answers")
    failures.check("the health afterwards, as HTTP has it", alive, 200, "")


class _Tally:
    """How requests ended, and the whole replies that are not the library's."""

    def __init__(self) -> None:
        self.whole = self.left = 0
        self.wrong: list[str] = []


async def _ask(client: httpx.AsyncClient, question: Question, own: Any, patience: float | None, tally: _Tally) -> None:
    """Ask one question, and leave after `patience` seconds, if that is a number."""
    try:
        async with asyncio.timeout(patience):
            reply = await client.post(question.path, json=question.body)
    except TimeoutError:
        tally.left += 1
        return
    tally.whole += 1
    said = question.read(data_of(reply) if question.is_stream else reply.json()) if reply.is_success else reply.text
    if said != own:
        tally.wrong.append(f"{question.path} {json.dumps(question.body)[:200]}: {said!r} instead of {own!r}")


async def _ask_all(server: Running, asked: list[tuple[Question, Any, float | None]]) -> _Tally:
    tally, waiting = _Tally(), iter(asked)

    async def caller(number: int) -> None:
        headers = {"user-agent": f"caller {number}"}
        async with httpx.AsyncClient(base_url=server.url, timeout=600, headers=headers) as client:
            for question, own, patience in waiting:
                await _ask(client, question, own, patience, tally)

    await asyncio.gather(*(caller(number) for number in range(AT_ONCE)))
    return tally


def check_callers(directory: Path, count: int, left: int, failures: Failures) -> None:
    draws = random.Random(0)
    with running(loader(directory), kept_bytes=KEPT_BYTES) as server:
        known = []
        for question in questions(server):
            started = time.perf_counter()
            known.append((question, question.own(), time.perf_counter() - started))

        def drawn(total: int, leaving: int) -> list[tuple[Question, Any, float | None]]:
            who_leaves = set(draws.sample(range(total), leaving))
            chosen = [draws.choice(known) for _ in range(total)]
            # Eight share the model, so that each takes about eight times as long as alone.
            return [
                (question, own, draws.uniform(0, AT_ONCE * seconds) if number in who_leaves else None)
                for number, (question, own, seconds) in enumerate(chosen)
            ]

        asyncio.run(_ask_all(server, drawn(WARM_UP, WARM_UP * left // count)))
        before = _State(server)
        started = time.perf_counter()
        tally = asyncio.run(_ask_all(server, drawn(count, left)))
        seconds = time.perf_counter() - started
        after = _State(server)
        print(f"     {tally.whole} whole replies and {tally.left} that were left, in {seconds:.0f} s")
        for line in tally.wrong[:5]:
            print(f"     {line}")
        failures.check("replies that are not the library's", len(tally.wrong), 0, "replies")
        failures.check("left behind", len(after.threads - before.threads), 0, "threads")
        failures.check("running or waiting", after.jobs, 0, "jobs")
        failures.check("still in use", after.locked, 0, "prefixes")
        failures.check("prefixes kept", after.prefix_bytes / 1e6, KEPT_BYTES / 1e6, "MB")
        failures.check("MLX's memory without them, against the warm server's", after.more_than(before), 2, "% more")
        growth = (after.resident / before.resident - 1) * 100
        failures.check("the process's memory, against the warm server's", growth, 2, "% more")


class _State:
    """What an idle server holds: threads, jobs, prefixes in use, and bytes."""

    def __init__(self, server: Running) -> None:
        server.wait_until(lambda: server.idle)
        kept = server.engine.loaded.prefixes
        self.prefix_bytes = kept.nbytes
        self.locked = sum(one.cache._lock.locked() for one in kept._kept)
        kept.clear()
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed in threads counts as held until then
        self.active = mx.get_active_memory()
        self.jobs = len(server.engine._running) + len(server.engine._queue)
        self.threads = {thread.ident for thread in threading.enumerate()}
        self.resident = _resident_bytes()

    def more_than(self, other: _State) -> float:
        return (self.active / other.active - 1) * 100


def _resident_bytes() -> int:
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, check=True)
    return int(said.stdout) * 1024


class Person(BaseModel):
    name: Literal["ada", "bob", "cy"]
    age: int = Field(ge=0, le=99)
    nick: Annotated[str, Field(max_length=6)] | None


class Team(BaseModel):
    lead: Person
    others: list[Person] = Field(min_length=1, max_length=2)
    is_open: bool


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: int = Field(ge=1, le=9)


class Box(BaseModel):
    kind: Literal["box"]
    sides: list[Annotated[int, Field(ge=1, le=9)]] = Field(min_length=2, max_length=2)


class Drawing(BaseModel):
    title: Literal["plan", "map"]
    shapes: list[Circle | Box] = Field(max_length=2)
    by: Person | None


FORMS: tuple[type[BaseModel], ...] = (Person, Team, Drawing)


def check_forms(directory: Path, count: int, failures: Failures) -> None:
    valid, called = Counter[str](), Counter[str]()
    with running(loader(directory)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=600)
        for seed in range(count):
            form, how = FORMS[seed % len(FORMS)], ("response_format", "auto", "required")[seed // len(FORMS) % 3]
            given: dict[str, Any] = {"model": "", "seed": seed, "messages": user("json name=bob age=12")}
            if how == "response_format":
                given["response_format"] = form
            else:
                given |= {"messages": user("how is lima today?"), "tool_choice": how}
                given["tools"] = [openai.pydantic_function_tool(each) for each in FORMS]
            reply = client.chat.completions.parse(**given, extra_body={"max_steps": 2})
            message = reply.choices[0].message
            calls = [call.function.parsed_arguments for call in message.tool_calls or []]
            called[how] += bool(calls)
            is_valid = all(isinstance(call, FORMS) for call in calls)
            if how == "response_format":
                is_valid = isinstance(message.parsed, form)
            elif how == "required":
                is_valid = is_valid and bool(calls)
            valid[how] += is_valid
    print("     valid:", dict(valid), "with calls:", dict(called))
    failures.check(f"of {count} replies, those that are not valid", count - valid.total(), 0, "replies")


def check_overhead(directory: Path, count: int, failures: Failures) -> None:
    """A short reply tells what a request costs; what a long one costs beyond that is that of its steps."""
    with running(loader(directory), kept_bytes=0, options=GenerationOptions(canvas_length=32)) as server:
        short = _differences(server, count, max_tokens=8, max_steps=1)
        whole = _differences(server, count, max_tokens=160, max_steps=8)
        streamed = _differences(server, count, max_tokens=160, max_steps=8, stream=True)
        framed = _differences(server, count, max_tokens=160, max_steps=8, stream=True, frames=True)
    print(f"     a short reply takes {short.own * 1e3:.1f} ms, a step of a long one {whole.per_step * 1e3:.1f} ms")
    failures.check(f"a request, beside the library's, ± {short.margin * 1e3:.1f}", short.more * 1e3, 5, "ms more")
    for name, pairs in (("whole", whole), ("streamed", streamed), ("with a frame for each step", framed)):
        share, margin = ((seconds / pairs.own * 100) for seconds in (pairs.more - short.more, pairs.margin))
        failures.check(f"a step of a reply that is sent {name}, ± {margin:.1f}", share, 2, "% more")


class _Pairs(NamedTuple):
    """Medians, in seconds: the library's time for a reply, and how much longer the server took, with about 95 % within
    `margin` of it. steps: of the reply.
    """

    own: float
    more: float
    margin: float
    steps: int

    @property
    def per_step(self) -> float:
        return self.own / self.steps


def _differences(server: Running, count: int, *, stream: bool = False, frames: bool = False, **few: int) -> _Pairs:
    """Time the same reply from the library and from the server, in turns, after one pair that warms up."""
    model, processor, _ = server.engine.loaded
    options = GenerationOptions(canvas_length=32, confidence=0, **few)
    own, more, steps = [], [], 0

    def library(seed: int) -> float:
        nonlocal steps
        started = time.perf_counter()
        steps = sum(generate(model, processor, user("count from 17"), options=options, seed=seed).stats.steps)
        return time.perf_counter() - started

    def served(seed: int) -> float:
        body = {"messages": user("count from 17"), "confidence": 0, **few, "seed": seed}
        started = time.perf_counter()
        server.post(CHAT, **body, stream=stream, frames=frames).raise_for_status()
        return time.perf_counter() - started

    for seed in range(count + 1):
        first, second = (library, served) if seed % 2 else (served, library)
        times = {first: first(seed), second: second(seed)}
        if seed:
            own.append(times[library])
            more.append(times[served] - times[library])
    more.sort()
    rank = math.floor(count / 2 - math.sqrt(count))  # between such ranks lies the true median, as coins fall
    margin = (more[-1 - max(rank, 0)] - more[max(rank, 0)]) / 2
    return _Pairs(statistics.median(own), statistics.median(more), margin, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["schemathesis", "callers", "forms", "overhead"])
    parser.add_argument("--count", type=int, help="requests, pairs, or examples for each address")
    parser.add_argument("--left", type=int, default=90, help="callers that leave, where their reply is not there yet")
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    failures = Failures()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (
            arguments.checkpoint or convert_checkpoint(DEMO, Path(temporary) / "demo", bits=None, dtype="float32").out
        )
        match arguments.what:
            case "schemathesis":
                check_strange_requests(directory, arguments.count or 20, failures)
            case "callers":
                check_callers(directory, arguments.count or 300, arguments.left, failures)
            case "forms":
                check_forms(directory, arguments.count or 200, failures)
            case "overhead":
                check_overhead(directory, arguments.count or 40, failures)
    sys.exit(failures.count > 0)


if __name__ == "__main__":
    main()
