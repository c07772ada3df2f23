"""Images that requests name by address: where that was opted for, over https, from public addresses, within limits."""

import base64
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from servers import loader, running

from mlx_diffusiongemma.errors import PromptError
from mlx_diffusiongemma.server import remote
from mlx_diffusiongemma.server.remote import fetch, is_public

IMAGE = Path(__file__).parents[1] / "data" / "tiny" / "eval" / "images" / "002.png"


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.8.9.1",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
        ),
        *("224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2001:0:1::"),
    ],
)
def test_addresses_that_lead_to_a_private_network_are_not(address):
    assert not is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "169.254.169.254"])
def test_nothing_is_asked_of_a_private_network(host, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it connected"))
    with pytest.raises(PromptError, match=r"private network|cannot be downloaded"):
        fetch(f"https://{host}/x.png")


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(PromptError, match="private network"):
        fetch("https://example.org/x.png")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site over https on this machine. Yields its address and the certificates that it is trusted by."""
    folder = tmp_path_factory.mktemp("site")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *named]
    subprocess.run(command, check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in ("/drips", "/drips-headers"):
                return self.drip(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if self.path == "/drips" else b"X: "))
            place = {"/once": "/image?x=1", "/ever": "/ever", "/inside": "https://10.0.0.1/", "/plain": "http://e.org/"}
            if self.path in place:
                self.send_response(302)
                self.send_header("Location", place[self.path])
            else:
                self.send_response(200 if self.path == "/image?x=1" else 404)
            self.end_headers()
            if self.path == "/image?x=1":
                self.wfile.write(IMAGE.read_bytes())

        def drip(self, beginning):
            """A byte now and then, for ever, until the other side has had enough."""
            with suppress(OSError):
                self.wfile.write(beginning)
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        served.load_cert_chain(certificate, key)
        server.socket = served.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://localhost:{server.server_port}", ssl.create_default_context(cafile=str(certificate))
        server.shutdown()
        thread.join()


def here(address):
    return address in ("127.0.0.1", "::1") or is_public(address)


def test_an_image_is_fetched_also_behind_a_redirect(site):
    url, trusted = site
    assert fetch(f"{url}/image?x=1", here, trusted) == fetch(f"{url}/once", here, trusted) == IMAGE.read_bytes()


@pytest.mark.parametrize(
    ("path", "said"),
    [("/inside", "private network"), ("/plain", "no https"), ("/ever", "redirected"), ("/none", "status 404")],
)
def test_a_redirect_leads_nowhere_else(site, path, said):
    url, trusted = site
    with pytest.raises(PromptError, match=said):
        fetch(url + path, here, trusted)


def test_size_time_and_certificate_are_checked(site, monkeypatch):
    url, trusted = site
    with pytest.raises(PromptError, match="cannot be downloaded"):
        fetch(f"{url}/image?x=1", here)
    monkeypatch.setattr(remote, "MOST_BYTES", 10)
    with pytest.raises(PromptError, match="larger"):
        fetch(f"{url}/image?x=1", here, trusted)
    monkeypatch.setattr(remote, "SECONDS", 0)
    with pytest.raises(PromptError, match="longer"):
        fetch(f"{url}/image?x=1", here, trusted)


@pytest.mark.parametrize("path", ["/drips", "/drips-headers"])
def test_a_site_that_drips_bytes_is_left_in_time(site, path, monkeypatch):
    url, trusted = site
    monkeypatch.setattr(remote, "SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(PromptError, match="cannot be downloaded"):
        fetch(url + path, here, trusted)
    assert time.monotonic() - started < 3


def test_a_site_that_drips_its_handshake_is_left_in_time(monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\x00")  # a long handshake message begins
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.02)

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        with pytest.raises(PromptError, match="cannot be downloaded"):
            fetch(f"https://localhost:{server.getsockname()[1]}/", here)
        thread.join()
    assert time.monotonic() - started < 3


def test_a_server_that_may_fetches_the_images_of_a_chat(demo_float32, site, monkeypatch):
    url, trusted = site
    monkeypatch.setattr(remote, "fetch", lambda asked: fetch(asked, here, trusted))

    def ask(image):
        return [{"role": "user", "content": [image, {"type": "text", "text": "colors?"}]}]

    with running(loader(demo_float32), remote_images=True) as server:
        image = {"type": "image_url", "image_url": {"url": f"{url}/once"}}
        reply = server.post("/v1/chat/completions", messages=ask(image), seed=0).json()
        assert reply["choices"][0]["message"]["content"] == "yellow blue"
        image = {"type": "image", "source": {"type": "url", "url": f"{url}/once"}}
        reply = server.post("/v1/messages", messages=ask(image), seed=0, max_tokens=40).json()
        assert reply["content"][0]["text"] == "yellow blue"
        data = "data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": data}}
        assert server.post("/v1/chat/completions", messages=ask(image), seed=0).status_code == 200
        for refused in (f"{url}/inside", "http://e.org/x.png", "file:///etc/passwd"):
            image = {"type": "image_url", "image_url": {"url": refused}}
            assert server.post("/v1/chat/completions", messages=ask(image)).status_code == 400
