"""Images from the web, where the server may fetch them: over https alone, and never from a private network."""

from __future__ import annotations

import asyncio
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import PromptError

MOST_BYTES = 16 * 2**20
SECONDS = 15.0  # for one image, redirects and all
MOST_REDIRECTS = 3
_NAT64, _6TO4 = ipaddress.ip_network("64:ff9b::/32"), ipaddress.ip_network("2002::/16")  # lead to any IPv4 address


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, so that what answers there is open to anybody."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and (ip.ipv4_mapped or ip in _NAT64 or ip in _6TO4):
        return False
    return ip.is_global and not ip.is_multicast


async def with_images_fetched(messages: Sequence[Any]) -> list[Any]:
    """The chat messages with the content of every image that has an https address. Raises PromptError."""

    async def fetched(part: Any) -> Any:
        url = _address(part)
        return part if url is None else {"type": "image", "image": await asyncio.to_thread(fetch, url)}

    made: list[Any] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            message = {**message, "content": await asyncio.gather(*map(fetched, content))}
        made.append(message)
    return made


def fetch(url: str, allowed: Callable[[str], bool] = is_public, trusted: ssl.SSLContext | None = None) -> bytes:
    """Download what is at an https address, within the limits on size and time.

    allowed: says which IP addresses may be connected to, also by redirects. trusted: certificates; None are the
    system's. Raises PromptError.
    """
    deadline = time.monotonic() + SECONDS
    first, trusted = url, trusted or ssl.create_default_context()
    try:
        for _ in range(MOST_REDIRECTS + 1):
            found = _one(url, deadline, allowed, trusted)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PromptError(f"{first[:80]} cannot be downloaded ({str(error)[:80]}); check the address.") from None
    raise PromptError(f"{first[:80]} is redirected more than {MOST_REDIRECTS} times; give the last address.")


def _one(url: str, deadline: float, allowed: Callable[[str], bool], trusted: ssl.SSLContext) -> bytes | str:
    """The content at an address, or the address that it redirects to."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise PromptError(f"{url[:80]} is no https address; images come from those, or as data: URLs.")
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    with (
        _connected(parts.hostname, parts.port or 443, deadline, allowed) as plain,
        trusted.wrap_socket(plain, server_hostname=parts.hostname) as secured,
    ):
        connection.sock = _UntilDeadline(secured, deadline)
        connection.request("GET", path, headers={"User-Agent": "mlx-diffusiongemma", "Accept": "image/*"})
        answer = connection.getresponse()
        if 300 <= answer.status < 400 and (place := answer.getheader("Location")):
            return place
        if answer.status != 200:
            raise OSError(f"status {answer.status}")
        content = bytearray()
        while chunk := answer.read1(2**16):
            content += chunk
            if len(content) > MOST_BYTES:
                raise PromptError(f"{url[:80]} is larger than {MOST_BYTES // 2**20} MB; give a smaller image.")
        return bytes(content)


def _connected(host: str, port: int, deadline: float, allowed: Callable[[str], bool]) -> socket.socket:
    """Connect to the very address that was checked: a name looked up twice may lead elsewhere."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(place[0]) for *_, place in found]
    if not all(map(allowed, addresses)):
        raise PromptError(f"{host[:80]} is in a private network, and nothing is fetched there; send a data: URL.")
    connected = socket.create_connection((addresses[0], port), timeout=_left(deadline))
    connected.settimeout(_left(deadline))  # of the whole handshake
    return connected


class _UntilDeadline(io.RawIOBase):
    """A connection, as http.client uses one, that ends at a deadline, however often a byte comes: a socket's own
    timeout begins anew with each.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def sendall(self, content: bytes) -> None:
        self._connection.settimeout(_left(self._deadline))
        self._connection.sendall(content)

    def close(self) -> None:
        """Leave it open: http.client closes a connection before it reads the answer, and whoever made it closes it."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)


def _left(deadline: float) -> float:
    """The seconds that are left. Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"it took longer than {SECONDS:.0f} seconds")
    return left


def _address(part: Any) -> str | None:
    """The https address of an image; None for any other part."""
    source = part.get("image") or part.get("image_url") if isinstance(part, Mapping) else None
    url = source.get("url") if isinstance(source, Mapping) else source
    return url if isinstance(url, str) and url[:8].lower() == "https://" else None
