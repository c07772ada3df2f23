"""The server as a process: it listens, and stops within a denoising step."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from ..errors import PromptError
from .app import make_app
from .guard import Rules
from .service import Service

PATIENCE = 5  # seconds that connections have to end, once what they wait for has been told off


class _Server(uvicorn.Server):
    """Tells the engine first when it is to stop: what runs would keep its connection open to its end."""

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.on_start = service, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_start()

    async def on_tick(self, counter: int) -> bool:
        if self.service.engine.error:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.engine.close()
        await super().shutdown(sockets)


def serve(service: Service, rules: Rules, port: int, on_start: Callable[[int], None]) -> None:
    """Serve until a signal ends it. on_start: is told the port, once it is listened on; 0 chooses a free one.

    Raises PromptError where the port is taken, and whatever kept the model from being loaded.
    """
    listening = listen(rules.host, port)
    config = uvicorn.Config(
        make_app(service, rules),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=PATIENCE,
        ws="none",
    )
    with listening:
        chosen = listening.getsockname()[1]
        _Server(config, service, lambda: on_start(chosen)).run(sockets=[listening])
    if service.engine.error:
        raise service.engine.error


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the server listens on. Raises PromptError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise PromptError(f"{host}:{port} cannot be listened on ({reason}); give another --host or --port.") from None
    return listening
