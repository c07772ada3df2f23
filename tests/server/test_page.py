"""The page's files: they are served, complete, and nothing in them or in a reply can become a script."""

import re

import pytest
from servers import user

from mlx_diffusiongemma.server.interfaces.page import FOLDER


@pytest.mark.parametrize(("path", "kind"), [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "javascript")])
def test_every_file_is_served_and_comes_from_here_alone(server, path, kind):
    reply = server.http.get(path)
    assert reply.status_code == 200 and kind in reply.headers["content-type"]
    assert "script-src 'self'" in reply.headers["content-security-policy"]
    assert "http://" not in reply.text and "https://" not in reply.text


def test_what_the_script_looks_for_is_on_the_page():
    page, script = (FOLDER / "index.html").read_text(), (FOLDER / "page.js").read_text()
    named = set(re.findall(r'\bat\("(\w+)"\)', script)) | set(
        re.findall(r'"(\w+)"', script.split("REMEMBERED = ")[1][:90])
    )
    assert len(named) > 10 and named <= set(re.findall(r'id="(\w+)"', page))
    for selector in re.findall(r'find\("\.(\w+)"\)', script):
        assert f'class="{selector}' in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_the_fields_that_the_page_reads_are_those_that_are_sent(server):
    body = {"messages": user("reverse abc"), "stream": True, "frames": True, "reasoning_effort": "none"}
    text = server.post("/v1/chat/completions", **body).text
    script = (FOLDER / "page.js").read_text()
    for name in ("pieces", "entropy", "accepted", "block", "step", "total"):
        assert f"frame.{name}" in script and f'"{name}":' in text
    for name in ("predicted_n", "predicted_per_second", "cache_n", "prompt_n"):
        assert f"speed.{name}" in script and f'"{name}":' in text


def test_the_addresses_are_listed(server):
    listed = server.http.get("/docs").text
    described = server.http.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in described and all(path in listed for path in described)
    assert "cdn" not in listed
