"""Many callers and one model: turns, bounds, disconnects, kept prefixes and endings."""

import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import mlx.core as mx
import pytest
from servers import loader, running, user

from mlx_diffusiongemma import GenerationOptions, generate, load
from mlx_diffusiongemma.server.work.prefixes import MOST, PrefixPool
from mlx_diffusiongemma.server.work.waiting import FairQueue

CHAT = "/v1/chat/completions"
FEW = GenerationOptions(seed=0, max_steps=2, max_tokens=4)
# A canvas that never is confident enough.
ENDLESS = {"messages": user("reverse abc"), "confidence": 0, "max_steps": 10**6, "stream": True}


def job(caller, urgent=False, slot=None):
    return SimpleNamespace(caller=caller, urgent=urgent, slot=slot)


def test_callers_take_turns():
    queue, jobs = FairQueue(), [job(name) for name in "aaabb"]
    for one in jobs:
        queue.add(one)
    assert [queue.pop().caller for _ in jobs] == list("ababa")
    assert queue.pop() is None and len(queue) == 0


def test_an_urgent_job_is_found_behind_others_and_a_slot_is_one_callers():
    queue, jobs = FairQueue(), [job("a"), job("b"), job("b", urgent=True, slot="0")]
    for one in jobs:
        queue.add(one)
    assert queue.in_slot(job("b", slot="0")) is jobs[2] and queue.in_slot(job("a", slot="0")) is None
    assert queue.pop(urgent=True) is jobs[2] and queue.pop(urgent=True) is None
    assert queue.remove(jobs[0]) and not queue.remove(jobs[0]) and len(queue) == 1


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


def test_a_prefix_is_copied_for_another_conversation_and_taken_by_the_same(demo):
    model, processor = demo
    pool = PrefixPool(model, 10**9)
    rules = "Be brief. " * 12

    def read(text):
        prompt = processor.prompt([{"role": "system", "content": rules}, *user(text)])
        cache = pool.take(prompt)
        result = generate(model, processor, prompt, options=FEW, cache=cache)
        pool.keep(cache, prompt)
        assert result.tokens == generate(model, processor, prompt, options=FEW).tokens
        return result.stats.cached_tokens

    long = "reverse " + "abcdefgh" * 12
    assert read(long) == 0 and len(pool) == 1
    read("sort 21")  # which finds where the two part, out of reach in the first
    assert len(pool) == 2
    assert read("sort 3412") > 100 and len(pool) == 2  # takes over from one so short
    assert read(long + "x") > 200 and len(pool) == 2
    assert all(not kept.cache._lock.locked() for kept in pool._kept)


def test_prefixes_keep_to_their_budget(demo):
    model, processor = demo
    pool = PrefixPool(model, 10**9)
    prompts = [processor.prompt(f"{number} reverse") for number in range(MOST + 3)]
    for prompt in prompts:
        cache = model.make_cache()
        model.encode(mx.array([prompt.tokens]), cache)
        pool.keep(cache, prompt)
    assert len(pool) == MOST
    pool.most_bytes = pool.nbytes // 2
    pool.keep(model.make_cache(), prompts[0])  # an empty one is not kept
    assert 0 < len(pool) <= MOST // 2 and pool.nbytes <= pool.most_bytes


def test_a_full_queue_asks_for_patience_and_a_disconnect_makes_room(demo_float32):
    with running(loader(demo_float32), queue=1) as server, ThreadPoolExecutor(2) as pool:
        with server.http.stream("POST", CHAT, json=ENDLESS):
            server.wait_until(lambda: server.engine._running)
            left = pool.submit(httpx.post, server.url + CHAT, json=ENDLESS, timeout=0.5)
            server.wait_until(lambda: len(server.engine._queue) == 1)
            full = server.post(CHAT, messages=user("sort 21"))
            assert full.status_code == 429 and 1 <= int(full.headers["retry-after"]) <= 60
            assert isinstance(left.exception(), httpx.ReadTimeout)
            server.wait_until(lambda: len(server.engine._queue) == 0)  # gone before its turn came
        server.wait_until(lambda: server.idle, seconds=5)
        assert server.post(CHAT, messages=user("sort 21")).status_code == 200


def test_a_completion_runs_between_two_canvases_and_replaces_an_older_one(server):
    long = {"messages": user("count from 17"), "max_tokens": 120, "confidence": 0, "max_steps": 8, "seed": 1}
    infill = {"input_prefix": "ab", "input_suffix": "yz", "n_predict": 1, "id_slot": 0, "max_steps": 2}
    ended = []

    def ask(name, path, body):
        reply = httpx.post(server.url + path, json=body, timeout=60)
        ended.append(name)
        return reply

    with ThreadPoolExecutor(3) as pool:
        chat = pool.submit(ask, "chat", CHAT, long)
        server.wait_until(lambda: server.engine._running)
        older = pool.submit(ask, "older", "/infill", infill)
        server.wait_until(lambda: len(server.engine._queue) == 1)
        newer = pool.submit(ask, "newer", "/infill", infill)
        assert older.result().status_code == 409 and newer.result().status_code == 200
        assert chat.result().status_code == 200
    assert ended == ["older", "newer", "chat"]
    alone = server.post(CHAT, **long).json()["choices"][0]["message"]
    assert chat.result().json()["choices"][0]["message"] == alone


def test_many_requests_of_which_some_leave(server):
    """Every reply is the library's own for its seed; nothing is left of those that nobody waited for."""
    model, processor = server.engine.loaded[:2]
    draw = random.Random(5)
    asked = [(draw.choice(("reverse abcd", "sort 4213", "json name=bob age=12")), seed) for seed in range(12)]
    own = {pair: generate(model, processor, pair[0], seed=pair[1]).text for pair in asked}
    server.post(CHAT, messages=user("sort 21"))
    threads = threading.active_count()

    def ask(pair):
        if pair[1] % 4 == 0:
            with httpx.stream("POST", server.url + CHAT, json=ENDLESS):
                time.sleep(pair[1] / 500)
            return None
        body = {"messages": user(pair[0]), "seed": pair[1]}
        return httpx.post(server.url + CHAT, json=body, timeout=60).json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, asked))
    assert all(text is None or text == own[pair] for pair, text in zip(asked, texts, strict=True))
    server.wait_until(lambda: server.idle, seconds=5)
    assert threading.active_count() == threads
    assert len(server.engine.loaded.prefixes) <= MOST
    assert all(not kept.cache._lock.locked() for kept in server.engine.loaded.prefixes._kept)


def test_while_the_model_loads_there_is_no_service(demo_float32):
    gate = threading.Event()

    def wait():
        assert gate.wait(20)
        return load(demo_float32)

    with running(wait, ready=False) as server:
        for reply in (server.post(CHAT, messages=user("x")), server.http.get("/health"), server.http.get("/v1/models")):
            assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
        gate.set()
        server.wait_until(lambda: server.engine.state == "ready")
        assert server.http.get("/health").status_code == 200


def test_what_went_wrong_inside_is_logged_and_not_told(server, monkeypatch, caplog):
    def fail(prompt):
        raise RuntimeError("secret")

    monkeypatch.setattr(server.engine.loaded.prefixes, "take", fail)
    reply = server.post(CHAT, messages=user("x"))
    assert reply.status_code == 500 and "secret" not in reply.text
    for path, body in (
        (CHAT, {"messages": user("x")}),
        ("/v1/messages", {"messages": user("x"), "max_tokens": 4}),
        ("/v1/responses", {"input": "x"}),
    ):
        caplog.clear()
        streamed = server.post(path, **body, stream=True)
        assert '"error"' in streamed.text and "secret" not in streamed.text and "[DONE]" not in streamed.text
        assert "secret" in caplog.text


def test_figures_are_told(server):
    def figures():
        return dict(re.findall(r"^([a-z_]+(?:\{.*\})?) (\S+)$", server.http.get("/metrics").text, re.MULTILINE))

    before = figures()
    assert server.http.get('/v1/models/any"thing').status_code == 200
    assert server.http.get("/made/up").status_code == 404
    usage = server.post(CHAT, messages=user("reverse abc")).json()["usage"]
    after = figures()
    gained = {name: float(after[name]) - float(before.get(name, 0)) for name in after}
    assert gained['mlx_dg_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert gained['mlx_dg_requests_total{path="/v1/models/{name:path}",status="200"}'] == 1
    assert "made" not in "".join(after)
    assert gained["mlx_dg_prompt_tokens_total"] == usage["prompt_tokens"]
    assert gained["mlx_dg_generated_tokens_total"] == usage["completion_tokens"]
    assert float(after["mlx_dg_memory_bytes"]) > 0 and after["mlx_dg_queue"] == "0"


def test_a_signal_ends_it_in_the_middle_of_a_reply(demo_float32, tmp_path):
    program = [str(Path(sys.executable).with_name("mlx-dg")), "serve", "--model", str(demo_float32), "--port", "0"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        said = iter(process.stderr.readline, "")
        url = next(match[1] for line in said if (match := re.search(r"The page: +(http\S+)", line)))
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.05)
        with httpx.stream("POST", url + CHAT, json=ENDLESS, timeout=30) as reply:
            lines = reply.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        log = process.stderr.read()
        assert process.wait(30) == 143
    assert '"role":"assistant"' in first and "The server is closing" in rest
    assert f"POST {CHAT} 200" in log and "reverse" not in log and "Traceback" not in log
