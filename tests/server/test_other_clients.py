"""Clients of other makers, from the registry: Mistral's, Inception's, and the `llm` command."""

import json

import pytest
from click.testing import CliRunner
from inceptionai import Inception
from llm.cli import cli
from mistralai.client import Mistral
from mistralai.client.models import ChatCompletionResponse, CompletionChunk, FIMCompletionResponse
from servers import user

from mlx_diffusiongemma import GenerationOptions, Hole, generate, infill

SEED = {"seed": 7}
FEW = {**SEED, "max_steps": 2}


@pytest.fixture(scope="module")
def mistral(server):
    with Mistral(api_key="any", server_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def inception(server):
    with Inception(api_key="any", base_url=server.url, max_retries=0, _strict_response_validation=True) as client:
        yield client


def test_mistrals_client_fills_a_middle(server, mistral):
    own = infill(*server.engine.loaded[:2], ["abc", Hole(4), "hij"], options=GenerationOptions(seed=3)).holes[0]
    asked = {"model": "codestral", "prompt": "abc", "suffix": "hij", "max_tokens": 4, "random_seed": 3}
    reply = mistral.fim.complete(**asked)
    FIMCompletionResponse.model_validate(reply.model_dump(), strict=True)
    assert reply.choices[0].message.content == own
    chunks = [event.data for event in mistral.fim.stream(**asked)]
    for chunk in chunks:
        CompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == own


def test_mistrals_client_chats(server, mistral):
    asked = {"model": "mistral", "messages": user("reverse abcdef"), "random_seed": 7}
    reply = mistral.chat.complete(**asked)
    ChatCompletionResponse.model_validate(reply.model_dump(), strict=True)
    assert reply.choices[0].message.content == "fedcba"
    streamed = [event.data.choices[0].delta.content for event in mistral.chat.stream(**asked)]
    assert "".join(filter(None, streamed)) == "fedcba"


def test_inceptions_client_sees_the_drafts(server, inception):
    asked = {"model": "mercury", "messages": user("count from 17"), "extra_body": SEED}
    own = generate(*server.engine.loaded[:2], "count from 17", seed=7).text
    assert inception.chat.completions.create(**asked).choices[0].message.content == own
    chunks = inception.chat.completions.create(**asked, stream=True, diffusing=True)
    drafts = [text for chunk in chunks if (text := chunk.choices[0].delta.content)]
    assert len(set(drafts)) > 2 and drafts[-1] == own


def test_inceptions_client_fills_edits_and_decides(inception):
    filled = inception.fim.completions.create(model="mercury", prompt="abc", suffix="hij", max_tokens=4, extra_body=FEW)
    assert filled.choices[0].finish_reason in ("stop", "length")
    tags = ("current_file_content", "code_to_edit")
    region = "\n".join(f"<|{tag}|>" for tag in tags) + "\ncba\n" + "\n".join(f"<|/{tag}|>" for tag in reversed(tags))
    edited = inception.edit.completions.create(model="mercury", messages=user(region), extra_body=FEW)
    assert edited.object == "edit.completion"
    questions = {
        "which": {"type": "choice", "criteria": {"12": None, "21": None}},
        "is": {"type": "noul", "instructions": "Is it sorted?"},
        "how": {"type": "score", "criteria": ["badly", {"well": True}]},
    }
    answers = inception.decisions.create(model="mercury", state="sort 21", questions=questions).answers
    assert answers["which"].choice in ("12", "21") and 0 < answers["is"].noul < 1 and 0 < answers["how"].score < 1


def test_the_llm_command_asks(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    model = {"model_id": "ours", "model_name": "any", "api_base": f"{server.url}/v1", "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))

    def ask(*words):
        result = CliRunner().invoke(cli, ["-m", "ours", "-o", "seed", "7", "-n", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert ask("reverse abcdef").strip() == ask("--no-stream", "reverse abcdef").strip() == "fedcba"
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    assert isinstance(json.loads(ask("--schema", json.dumps(schema), "json name=bob age=12"))["ok"], bool)
