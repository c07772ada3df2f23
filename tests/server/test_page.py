"""The page's files: they are served, complete, and nothing in them or in a reply can become a script."""

import re
from pathlib import PurePath

import pytest
from servers import user

from mlx_diffusiongemma.server.interfaces.page import FOLDER

SCRIPTS = "".join(path.read_text() for path in FOLDER.glob("*.js"))
KINDS = {".html": "text/html", ".css": "text/css", ".js": "javascript"}


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_every_file_is_served_and_comes_from_here_alone(server, name):
    reply = server.http.get("/" if name == "index.html" else f"/page/{name}")
    assert reply.status_code == 200 and KINDS[PurePath(name).suffix] in reply.headers["content-type"]
    assert "script-src 'self'" in reply.headers["content-security-policy"]
    assert "http://" not in reply.text and "https://" not in reply.text


@pytest.mark.parametrize("name", ["..%2f__init__.py", "%2e%2e%2fguard.py", "none.js", ""])
def test_no_other_file_is_served(server, name):
    assert server.http.get(f"/page/{name}").status_code == 404


def test_what_the_scripts_look_for_is_on_the_page():
    page = (FOLDER / "index.html").read_text()
    named = set(re.findall(r'\bat\("(\w+)"\)', SCRIPTS))
    assert len(named) > 10 and named <= set(re.findall(r'id="(\w+)"', page))
    found = re.findall(r'find\("\.(\w+)"\)', SCRIPTS)
    assert len(found) > 8 and set(found) <= set(" ".join(re.findall(r'class="([\w ]+)"', page)).split())
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", SCRIPTS)


def test_the_fields_that_the_page_reads_are_those_that_are_sent(server):
    body = {"messages": user("reverse abc"), "stream": True, "frames": True, "reasoning_effort": "none"}
    text = server.post("/v1/chat/completions", **body).text
    for name in ("pieces", "entropy", "accepted", "block", "step"):
        assert f"frame.{name}" in SCRIPTS and f'"{name}":' in text
    for name in ("predicted_n", "predicted_per_second", "cache_n", "prompt_n"):
        assert f"speed.{name}" in SCRIPTS and f'"{name}":' in text


def test_the_addresses_are_listed(server):
    listed = server.http.get("/docs").text
    described = server.http.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in described and all(path in listed for path in described)
    assert "cdn" not in listed
