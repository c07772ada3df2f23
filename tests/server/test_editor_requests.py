"""Requests as editors and their plugins write them, field by field, and what these programs read of the answers.

`tests/data/editor_requests.json` has a request each: `reads` are the places in the answer that the program looks at,
`text` is where it finds the text, in every chunk where the answer is a stream; each chunk `replaces` the text or adds
to it. What it must find is what the text `says`, what `fills` a middle, or what a model `edits`.
"""

import json
from pathlib import Path

import pytest
from servers import data_of

from mlx_diffusiongemma import GenerationOptions, Hole, edit, infill
from mlx_diffusiongemma.server.interfaces.edits import read_region

REQUESTS = json.loads((Path(__file__).parents[1] / "data" / "editor_requests.json").read_text(encoding="utf-8"))
FEW = GenerationOptions(seed=3, max_steps=4)


def at(answer, path):
    """What is at a path such as `choices.0.text`; None where there is nothing."""
    for name in path.split("."):
        if isinstance(answer, list):
            answer = answer[int(name)] if int(name) < len(answer) else None
        else:
            answer = answer.get(name) if isinstance(answer, dict) else None
    return answer


def expected(server, asked):
    """The text that the library gives."""
    model, processor, _ = server.engine.loaded
    if "says" in asked:
        return asked["says"]
    if "edits" in asked:
        region = read_region(asked["body"]["messages"][0]["content"])
        own = edit(model, processor, region.text, region.span, region.instruction, options=FEW).text
        start, stop = region.span
        code = own[start : len(own) - (len(region.text) - stop)]
        return "None" if code == region.code else f"```\n{code}\n```"
    fills = asked["fills"]
    room = min(fills["tokens"], model.config.canvas_length * 3 // 4)
    parts = [part for part in (fills["before"], Hole(room), fills["after"]) if part]
    text = infill(model, processor, parts, options=FEW).holes[0]
    stops = asked["body"].get("stop") or []
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@pytest.mark.parametrize("asked", REQUESTS, ids=[asked["client"] for asked in REQUESTS])
def test_an_editor_reads_what_it_looks_for(server, asked):
    sampling = {"seed": 0} if "says" in asked else {"seed": FEW.seed, "max_steps": FEW.max_steps}
    reply = server.http.post(asked["path"], json={**asked["body"], **sampling}, headers=asked.get("headers"))
    assert reply.status_code == 200, reply.text
    if not asked["body"].get("stream"):
        answer = reply.json()
        assert all(at(answer, path) is not None for path in asked["reads"])
        assert "text" not in asked or at(answer, asked["text"]) == expected(server, asked)
        return
    texts = [text for chunk in data_of(reply) if isinstance(text := at(chunk, asked["text"]), str)]
    whole = "".join([text for text in texts if text][-1:] if "replaces" in asked else texts)
    assert whole == expected(server, asked)
