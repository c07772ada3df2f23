"""Forms: whatever the model wants, what comes back fits the fields."""

import json
import random
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffusiongemma import Choice, Digits, GenerationOptions, PromptError, Text, fill, load
from mlx_diffusiongemma.filling import forms as filling
from mlx_diffusiongemma.filling.denoisers import Restricted
from mlx_diffusiongemma.filling.forms import _confidence as confidence

TEMPLATE = '{"name": "{{name}}", "age": {{age}}}'


@pytest.fixture(scope="module")
def demo(demo_float32):
    return load(demo_float32)


@pytest.mark.parametrize("name", [Text(3), Choice(["rob", "bob"])])
def test_a_form_is_filled_from_its_instruction(demo, name):
    form = fill(
        *demo,
        TEMPLATE,
        {"name": name, "age": Digits(2)},
        GenerationOptions(seed=0, max_steps=6),
        instruction="json name=bob age=12",
    )
    assert json.loads(str(form)) == {"name": "bob", "age": 12} and form.values == {"name": "bob", "age": "12"}
    assert set(form.confidence) == {"name", "age"} and min(form.confidence.values()) > 0.9
    assert form.stats.steps and len(form.attempts) == 1


def test_cancelling_gives_no_values(demo, monkeypatch):
    cancel = threading.Event()
    cancel.set()
    asked = {"name": Text(3), "age": Digits(2)}
    form = fill(*demo, TEMPLATE, asked, GenerationOptions(max_steps=2), cancel=cancel)
    assert (form.finish_reason, form.text, form.values) == ("cancelled", "", {})
    late = threading.Event()
    monkeypatch.setattr(filling, "_confidence", lambda filler, names: late.set() or confidence(filler, names))
    form = fill(*demo, TEMPLATE, asked, GenerationOptions(max_steps=2), cancel=late)
    assert (form.finish_reason, form.text, form.values) == ("cancelled", "", {}) and form.attempts


@pytest.mark.parametrize("seed", range(2))
def test_it_always_parses(demo, seed):
    """Prompts that ask for something else, one step, flat settings: the fields hold all the same."""
    draw = random.Random(seed)
    instruction = draw.choice(["sort 312", "reverse abc", None, "solve ..../..../..../...."])
    options = GenerationOptions(seed=seed, max_steps=1 + seed % 2, entropy_bound=100.0, t_max=5.0, t_min=5.0)
    fields = {"name": Text(2), "age": Digits(2, least=2), "kind": Choice(["cat", "ox"])}
    template = '{"n":"{{name}}","age":{{age}},"kind":"{{kind}}"}'
    form = fill(*demo, template, fields, options, instruction=instruction)
    values = json.loads(form.text)
    assert values["kind"] in ("cat", "ox") and 10 <= values["age"] <= 99
    assert form.values == {"name": values["n"], "age": str(values["age"]), "kind": values["kind"]}
    assert all(0 <= value <= 1 for value in form.confidence.values())


def test_a_restricted_position_takes_allowed_tokens_only(demo):
    """Its numbers are those of the model's distribution over the allowed tokens; other positions are untouched."""
    model, _ = demo
    allowed = [[(10, 20, 30), None, (5, 6)], [None, (5, 6), None]]
    hidden = mx.random.normal((2, 3, 128), key=mx.random.key(1))
    keys = mx.stack([mx.random.key(2), mx.random.key(3)])
    restricted = Restricted(model, model, {"a": allowed[0], "left": [(1,)] * 3, "b": allowed[1]})
    reading, notes = restricted.read(hidden, 0.7, keys, ["a", "b"])
    assert notes is None
    plain = model.read_vocabulary(hidden, 0.7, keys)
    logits = model.logits(hidden) / 0.7
    for row in range(2):
        for place in range(3):
            ids = allowed[row][place]
            at = (row, place)
            if ids is None:
                assert reading.tokens[at].item() == plain.tokens[at].item()
                assert reading.sample[at].item() == plain.sample[at].item()
                assert np.allclose(reading.soft_embedding[at], plain.soft_embedding[at])
                continue
            own = mx.softmax(logits[row, place][mx.array(ids)])
            assert reading.tokens[at].item() == ids[own.argmax().item()] and reading.sample[at].item() in ids
            assert np.isclose(reading.entropy[at].item(), -(own * mx.log(own)).sum().item(), atol=1e-4)
            assert np.allclose(reading.soft_embedding[at], own @ model.embed(mx.array(ids)), atol=1e-4)
    last, _ = restricted.read(hidden, 0.7, None, ["a", "b"])
    assert last.sample is None and last.soft_embedding is None and last.tokens[0, 2].item() in (5, 6)


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        (TEMPLATE, {"name": Text(3)}, "field 'age' is not among"),
        (TEMPLATE, {"name": Text(3), "age": Digits(2), "kind": Text(1)}, "has no field 'kind'"),
        ("{{a}} {{a}}", {"a": Text(3)}, "'a' twice"),
        ("nothing", {}, "has no field"),
        ("{{a}}", {"a": Choice([])}, "list of different options"),
        ("{{a}}", {"a": Choice(["x", "x"])}, "list of different options"),
        ("{{a}}", {"a": Choice(["x", ""])}, "none of them empty"),
        ("{{a}}", {"a": Digits(1, least=2)}, "asks for 2 to 1 digits"),
        ("{{a}}", {"a": Text(0)}, "room for 0 tokens"),
        ("{{a}}", {"a": Text("a")}, "room for 'a' tokens"),
        ("{{a}}", {"a": Text(1, without=5)}, "without 5"),
        ("{{a}}", {"a": Digits("a")}, "'a' digits"),
        ("{{a}}", {"a": Choice(5)}, "list of different options"),
        ("{{a}}", {"a": Choice([["x"]])}, "texts, none of them empty"),
        ("{{a}}", {"a": 5}, "is 5; give a Choice"),
        ("{{a}}", 5, "fields by name"),
        (5, {}, "template, which is a text"),
        ("{{a}}" + "x" * 70, {"a": Text(3)}, "a canvas has 64"),
    ],
)
def test_bad_forms_are_refused_in_one_sentence(demo, template, fields, message):
    with pytest.raises(PromptError, match=message):
        fill(*demo, template, fields)
