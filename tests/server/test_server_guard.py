"""Who may ask the server, from where, and how much: what web pages and strangers try."""

from dataclasses import replace

import httpx
import pytest
from servers import loader, running, user
from starlette.datastructures import Headers
from typer.testing import CliRunner

from mlx_diffusiongemma import MODES
from mlx_diffusiongemma.cli import app
from mlx_diffusiongemma.server.guard import MOST_BODY_BYTES, Rules
from mlx_diffusiongemma.server.limits import DEEPEST, MOST_IMAGES
from mlx_diffusiongemma.server.refusals import Refusal

CHAT = "/v1/chat/completions"


def refusal(rules, path="/v1/models", **headers):
    try:
        rules.check(Headers({name.replace("_", "-"): value for name, value in headers.items()}), path)
    except Refusal as refused:
        return refused.status
    return None


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "[::1]:8080", "LOCALHOST:1"])
def test_this_machines_own_names_are_known(host):
    assert refusal(Rules(), host=host) is None


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil:80", "[::2]", "[x"])
def test_a_name_that_others_point_here_is_refused(server, host):
    assert refusal(Rules(), host=host) == 403
    reply = server.http.get("/v1/models", headers={"Host": host})
    assert reply.status_code in (400, 403)


def test_beyond_this_machine_an_address_is_known_and_a_foreign_name_is_not():
    rules = Rules(host="0.0.0.0", key="k")
    assert refusal(rules, host="192.168.1.7:80", x_api_key="k") is None
    assert refusal(rules, host="evil.example", x_api_key="k") == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "https://ok.example.evil"])
def test_pages_of_other_sites_are_refused(origin):
    assert refusal(Rules(origins=("https://ok.example",)), host="127.0.0.1:8080", origin=origin) == 403


def test_the_servers_own_page_and_allowed_sites_may_ask(demo_float32):
    own = Rules(origins=("https://ok.example",))
    assert refusal(own, host="127.0.0.1:8080", origin="http://127.0.0.1:8080") is None
    with running(loader(demo_float32), rules=own) as server:
        asking = {"Origin": "https://ok.example", "Access-Control-Request-Headers": "authorization,content-type"}
        preflight = server.http.options(CHAT, headers=asking)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
        reply = server.http.get("/v1/models", headers=asking)
        assert (
            reply.headers["access-control-allow-origin"] == "https://ok.example" and "Origin" in reply.headers["vary"]
        )
        assert "access-control-allow-credentials" not in reply.headers
        assert "access-control-allow-origin" not in server.http.get("/v1/models").headers
        assert server.http.options(CHAT, headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_key_is_needed_where_there_is_one():
    rules = Rules(key="secret")
    assert refusal(rules, host="localhost") == 401
    assert refusal(rules, host="localhost", authorization="Bearer wrong") == 401
    assert refusal(rules, host="localhost", authorization="bearer secret") is None
    assert refusal(rules, host="localhost", x_api_key="secret") is None
    assert refusal(rules, "/", host="localhost") is None
    assert refusal(rules, "/metrics", host="localhost") == 401


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_any_page_can_send_is_refused(server, kind):
    reply = server.http.post(CHAT, content=b'{"messages": []}', headers={"Content-Type": kind})
    assert reply.status_code == 415


def test_a_body_has_a_limit_declared_or_not(server):
    headers = {"Content-Type": "application/json"}
    chunk = b" " * 2**20

    count = MOST_BODY_BYTES // len(chunk) + 1
    for path, kind in ((CHAT, "invalid_request_error"), ("/v1/messages", "request_too_large")):
        for content in (chunk * count, (chunk for _ in range(count))):
            try:
                reply = server.http.post(path, content=content, headers=headers)
            except (httpx.WriteError, httpx.ReadError):  # it hung up before all was sent
                continue
            assert (reply.status_code, reply.json()["error"]["type"]) == (413, kind)
    read = server.service.engine.metrics.text({})
    assert 'status="413"' in read


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 10**5, b"3", b"\xff", b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"", b"NaN"]
)
def test_a_body_that_is_no_request_is_refused(server, content):
    for path in (CHAT, "/v1/messages", "/v1/responses", "/v1/completions", "/infill", "/tokenize"):
        reply = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400 and "error" in reply.json()


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("depth", [DEEPEST, 400])
def test_a_schema_has_a_limit(server, depth):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": nested(depth)}}
    tool = {"type": "function", "function": {"name": "x", "parameters": nested(depth)}}
    for given in ({"response_format": form}, {"tools": [tool]}):
        reply = server.post("/v1/chat/completions", messages=user("x"), **given)
        assert reply.status_code == 400 and "levels deep" in reply.json()["error"]["message"]


def test_json_that_is_nested_beyond_reading_is_refused(server):
    for depth in (900, 100_000):
        body = '{"questions": {"a": {"type": "noul"}}, "state": ' + "[" * depth + "]" * depth + "}"
        reply = server.http.post("/v1/decisions", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400 and reply.json()["error"]["message"].endswith(".")


def test_images_have_a_limit(server):
    pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    content = [{"type": "image_url", "image_url": {"url": pixel}}] * (MOST_IMAGES + 1)
    reply = server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}])
    assert reply.status_code == 400 and f"at most {MOST_IMAGES}" in reply.json()["error"]["message"]


def test_what_is_not_here_is_said_in_the_clients_words(server):
    assert server.http.get("/nothing").status_code == 404
    assert server.http.get("/v1/messages").json()["type"] == "error"
    assert server.http.get(CHAT).status_code == 405


def test_strict_names(demo_float32):
    with running(loader(demo_float32), strict_model=True, context=100) as server:
        assert server.post(CHAT, messages=user("sort 21"), model="other").json()["error"]["code"] == "model_not_found"
        assert server.post(CHAT, messages=user("sort 21"), model="demo").status_code == 200
        assert server.http.get("/v1/models/other").status_code == 404
        error = server.post(CHAT, messages=user("sort 21" * 30), model="demo").json()["error"]
        assert error["code"] == "context_length_exceeded" and error["n_ctx"] == 100


def test_a_servers_decoder_and_mode_are_those_of_silent_requests(demo_float32):
    options = MODES["fast"].with_decoder("autoregressive")
    with running(loader(demo_float32), options=replace(options, max_tokens=3)) as server:
        steps = [
            server.post(CHAT, messages=user("sort 21"), **more).json()["timings"]["denoising_steps"] > 0
            for more in ({}, {"decoder": "diffusion"}, {"decoder": "autoregressive", "temperature": 0})
        ]
        assert steps == [False, True, False]
        assert server.post("/infill", input_prefix="a", input_suffix="c", n_predict=1).status_code == 200
        assert server.post("/infill", input_prefix="a", decoder="speculative").status_code == 400


def test_the_command_says_what_it_needs(tmp_path):
    for options, expected in (
        (["--host", "0.0.0.0"], "--api-key"),
        (["--decoder", "other"], "none of"),
        (["--allow-origin", "*"], "site"),
        (["--port", "x"], "whole number"),
    ):
        done = CliRunner().invoke(app, ["serve", "--model", str(tmp_path), *options])
        assert done.exit_code == 2 and expected in done.output
    done = CliRunner().invoke(app, ["serve", "--model", str(tmp_path / "none"), "--port", "0"])
    assert done.exit_code == 1 and "none" in done.output
