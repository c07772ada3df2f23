"""A server in a thread of the test, on a free port, and what its clients send it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from mlx_diffusiongemma import GenerationOptions, load
from mlx_diffusiongemma.server.app import make_app
from mlx_diffusiongemma.server.guard import Rules
from mlx_diffusiongemma.server.running import listen
from mlx_diffusiongemma.server.service import Service
from mlx_diffusiongemma.server.work.engine import Engine


class Running:
    """A server that answers, and a plain client of it."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.engine, self.port = service, service.engine, port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def wait_until(self, holds: Any, seconds: float = 20) -> None:
        """Wait for what happens in other threads."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    @property
    def idle(self) -> bool:
        return not self.engine._running and not len(self.engine._queue)


@contextmanager
def running(
    loader: Any,
    rules: Rules | None = None,
    queue: int = 32,
    ready: bool = True,
    kept_bytes: int | None = None,
    **service: Any,
) -> Iterator[Running]:
    """Serve what `loader` loads. ready: wait until it is loaded."""
    rules = rules or Rules()
    engine = Engine(loader, queue=queue, kept_bytes=kept_bytes)
    made = Service(engine, "demo", **{"options": GenerationOptions(), **service})
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(made, rules), log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        live = Running(made, listening.getsockname()[1])
        live.wait_until(lambda: server.started and (not ready or engine.state == "ready"))
        yield live
        live.http.close()
    finally:
        engine.close()
        server.should_exit = True
        thread.join()
        listening.close()


def loader(directory: Any) -> Any:
    return lambda: load(directory)


def data_of(response: httpx.Response) -> list[Any]:
    """The events of a stream, without the end mark."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line.startswith("data:")]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
