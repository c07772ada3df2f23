"""Decisions: questions about a state, answered with the probabilities that the library gives."""

import base64
import math
from pathlib import Path

import pytest

from mlx_diffusiongemma import choose

IMAGE = Path(__file__).parents[1] / "data" / "tiny" / "eval" / "images" / "002.png"
STATE = {"task": "sort 21"}
QUESTIONS = {
    "which": {"type": "choice", "instructions": "What is it sorted?", "criteria": {"12": None, "21": "as it was"}},
    "done": {"type": "noul", "criteria": {"true": "it is sorted", "false": None}},
    "how": {"type": "score", "criteria": ["badly", "somewhat", "well"]},
    "only": {"type": "choice", "criteria": {"one": None}},
}


def test_questions_are_answered_as_the_library_answers(server):
    reply = server.post("/v1/decisions", model="any", state=STATE, questions=QUESTIONS, seed=5)
    answers = reply.json()["answers"]
    assert list(answers) == list(QUESTIONS) and reply.json()["model"] == "demo"
    model, processor = server.engine.loaded[:2]
    said = '{"task": "sort 21"}\n\nWhat is it sorted?\n\nAnswer with one of these alone:\n- 12\n- 21: as it was'
    own = choose(model, processor, said, ["12", "21"], seed=5)
    which = answers["which"]
    assert which["probabilities"] == pytest.approx(own, rel=1e-4)
    assert which["choice"] == max(own, key=own.get) and which["confidence"] == max(which["probabilities"].values())
    assert 0 < answers["done"]["noul"] < 1
    how = answers["how"]
    assert how["legend"] == {"0": "badly", "1": "somewhat", "2": "well"}
    assert math.isclose(sum(how["probabilities"].values()), 1)
    assert math.isclose(how["score"], how["probabilities"]["1"] + 2 * how["probabilities"]["2"])
    assert answers["only"] == {"type": "choice", "choice": "one", "confidence": 1, "probabilities": {"one": 1}}
    assert reply.json()["usage"]["input_tokens"] > 3 * len(said) / 4


def test_images_are_parts_of_a_state(server):
    url = "data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
    state = ["colors?", {"type": "image_url", "image_url": {"url": url}}]
    question = {"type": "choice", "criteria": {"yellow blue": None, "red red": None}}
    reply = server.post("/v1/decisions", state=state, questions={"colors": question}, seed=0).json()
    model, processor = server.engine.loaded[:2]
    said = '["colors?", "image 1"]\n\nAnswer with one of these alone:\n- yellow blue\n- red red'
    own = choose(model, processor, processor.prompt(said, images=[IMAGE]), ["yellow blue", "red red"], seed=0)
    assert reply["answers"]["colors"]["probabilities"] == pytest.approx(own, rel=1e-4)
    state[1]["image_url"]["url"] = "/etc/passwd"
    reply = server.post("/v1/decisions", state=state, questions={"colors": question})
    assert reply.status_code == 400 and "data: URL" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ({}, "questions"),
        ({"a": {"type": "other"}}, "questions.a"),
        ({"a": {"type": "choice"}}, "criteria"),
        ({"a": {"type": "choice", "criteria": {}}}, "criteria"),
        ({"a": {"type": "score", "criteria": ["x"] * 256}}, "criteria"),
        ({"a": {"type": "choice", "criteria": {"a" * 99: None, "b": None}}}, "shorter"),
        ({"a": {"type": "noul", "instructions": "abc " * 4000}}, "fit the context"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(server, questions, said):
    reply = server.post("/v1/decisions", state="sort 21", questions=questions)
    assert reply.status_code == 400 and said in reply.json()["error"]["message"]
