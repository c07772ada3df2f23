"""The page in a browser: replies, their steps, edits in place, forms, stopping and loading it again."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest
from playwright.sync_api import expect, sync_playwright
from servers import loader, running

from mlx_diffusiongemma import GenerationOptions, generate
from mlx_diffusiongemma.server.guard import Rules

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ON_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
IMAGE = Path(__file__).parents[1] / "data" / "tiny" / "eval" / "images" / "002.png"
COUNTING = " ".join(map(str, range(17, 47)))
CHAT, EDITS = "**/v1/chat/completions", "**/v1/edits"
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, (*NAMES, ON_MAC))), None)
    if path is None:
        missing = "there is no Chromium; install it: apt-get install chromium, or Google Chrome on a Mac"
        (pytest.fail if "CI" in os.environ else pytest.skip)(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def endless(demo_float32):
    """A server whose canvases never are confident enough."""
    with running(loader(demo_float32), options=GenerationOptions(confidence=0, max_steps=10**6)) as live:
        yield live


@contextmanager
def visit(browser, url, **context):
    """Open the page in a fresh tab. Whatever goes wrong in it, or asks for something elsewhere, fails the test."""
    wrong = []
    with browser.new_context(**context) as tab:
        page = tab.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: asked.url.startswith((url, "data:")) or wrong.append(asked.url))
        page.goto(url)
        yield page
    assert not wrong


@pytest.fixture
def page(browser, server):
    with visit(browser, server.url) as page:
        yield page


def set_seed(page, seed):
    page.evaluate("seed => { document.getElementById('seed').value = seed }", seed)


def ask(page, text, mode="chat"):
    page.locator(f"#modes [value={mode}]").check(force=True)
    page.locator("#prompt").fill(text)
    page.locator("#send").click()


def last(page, selector):
    return page.locator("article").last.locator(selector)


def answered(page, text="", count=1):
    """Wait for a reply that came whole, so many as there are."""
    expect(page.locator("article")).to_have_count(count)
    expect(last(page, ".canvas")).not_to_have_attribute("aria-busy", "true")
    expect(last(page, ".canvas")).to_contain_text(text)


def select(page, start, stop):
    """Select characters of the last reply, counted as JavaScript does."""
    last(page, ".canvas").evaluate(
        """(canvas, [start, stop]) => {
            const [text] = canvas.childNodes;
            getSelection().setBaseAndExtent(text, start, text, stop);
        }""",
        [start, stop],
    )


def sent(page, address, act):
    """The body of the request that `act` makes the page send."""
    with page.expect_request(address) as asked:
        act()
    return asked.value.post_data_json


def test_a_reply_arrives_and_its_steps_can_be_seen_again(page, server):
    set_seed(page, 7)
    ask(page, "count from 17")
    answered(page, COUNTING)
    assert last(page, ".canvas").inner_text() == generate(*server.engine.loaded[:2], "count from 17", seed=7).text
    expect(last(page, ".cost")).to_contain_text(re.compile(r"\d+ tokens · [\d.]+ per second · .* seed 7$"))
    slider, canvas = last(page, "[type=range]"), last(page, ".canvas")
    steps = int(slider.get_attribute("max"))
    slider.fill("0")
    first = canvas.inner_text()
    expect(last(page, "output")).to_have_text(f"step 1 of {steps}")
    assert first != COUNTING and last(page, ".token.redrawn").count() > 0
    doubts = last(page, ".token").evaluate_all("all => all.map(one => one.style.getPropertyValue('--doubt'))")
    assert max(map(float, doubts)) > 0.3 and min(map(float, doubts)) < 0.1
    slider.press("ArrowRight")
    assert canvas.inner_text() != first and last(page, ".token.new").count() > 0
    last(page, ".heat").click(position={"x": 2, "y": 9})
    assert canvas.inner_text() == first
    last(page, ".replay").click()
    expect(last(page, "output")).to_have_text(f"{steps} steps")
    expect(canvas).to_have_text(COUNTING)


# Keeps what is drawn, for `drafts` and `steps`.
WATCH = """() => {
    globalThis.drafts = new Set();
    globalThis.steps = 0;
    const watch = () => { steps += 1; drafts.add(document.querySelector("article:last-child .canvas").textContent); };
    new MutationObserver(watch).observe(document.getElementById("turns"), { childList: true, subtree: true });
}"""


def test_drafts_change_until_it_is_stopped(browser, endless):
    with visit(browser, endless.url) as page:
        for end in (page.locator("#stop").click, lambda: page.keyboard.press("Escape"), page.reload):
            page.evaluate(WATCH)
            ask(page, "count from 17")
            expect(last(page, "output")).to_contain_text("at most")
            endless.wait_until(lambda: page.evaluate("drafts.size > 1 && steps > 5"))
            assert not endless.idle
            end()
            endless.wait_until(lambda: endless.idle)
            if end != page.reload:
                expect(last(page, ".cost")).to_have_text("Stopped.")
                assert page.locator("#send").is_visible() and last(page, "[type=range]").is_enabled()


def test_a_selection_is_filled_in_place(page):
    torn = "🎲 " + COUNTING.replace("21 22 23", "99 98 97")
    set_seed(page, 0)
    ask(page, torn, "text")
    start = torn.index("99") + 1  # JavaScript counts the die twice
    select(page, start, start + 8)
    body = sent(page, EDITS, last(page, ".fill").click)
    assert body["span"] == [start - 1, start + 7] and "instruction" not in body
    expect(last(page, ".change")).to_be_visible()
    assert "".join(last(page, "del").all_inner_texts()) and "".join(last(page, "ins").all_inner_texts())
    last(page, ".undo").click()
    assert last(page, ".canvas").inner_text() == torn
    select(page, start, start + 8)
    last(page, ".fill").click()
    last(page, ".keep").click()
    kept = last(page, ".canvas").inner_text()
    assert kept != torn and kept.startswith("🎲 17 18 19 20 ") and kept.endswith(" 24 " + COUNTING[24:])
    assert last(page, "ins").count() == 0


def test_a_reply_is_rewritten_and_the_chat_goes_on_from_there(page):
    set_seed(page, 7)
    ask(page, "count from 17")
    answered(page, COUNTING)
    select(page, 9, 17)
    last(page, ".rewrite input").fill("leave it out")
    body = sent(page, EDITS, last(page, ".anew").click)
    assert body["instruction"] == "leave it out" and body["span"] == [9, 17] and body["input"] == COUNTING
    assert body["messages"] == [{"role": "user", "content": "count from 17"}]
    expect(last(page, ".change")).to_be_visible()
    last(page, "[type=range]").fill("0")
    assert last(page, ".canvas").inner_text().startswith(COUNTING[:9])
    last(page, ".keep").click()
    kept = last(page, ".canvas").inner_text()
    assert kept.startswith(COUNTING[:9]) and kept.endswith(COUNTING[17:])
    body = sent(page, CHAT, lambda: ask(page, "sort 21"))
    assert [message["content"] for message in body["messages"]] == ["count from 17", kept, "sort 21"]
    answered(page, count=2)


def test_a_selection_can_be_made_with_keys_alone(page):
    set_seed(page, 0)
    ask(page, "abc def", "text")
    last(page, ".select").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("x")
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    assert last(page, ".canvas").inner_text() == "abc def"
    expect(last(page, ".rewrite")).to_be_visible()
    page.keyboard.press("Tab")
    expect(last(page, ".rewrite input")).to_be_focused()
    assert sent(page, EDITS, last(page, ".fill").click)["span"] == [0, 3]
    expect(last(page, ".keep")).to_be_focused()


def test_leaving_with_a_key_keeps_what_was_selected_last(page):
    """The browser says that the selection changed only a moment later: with the focus gone, nothing else would."""
    ask(page, "abc def", "text")
    last(page, ".select").focus()
    page.keyboard.press("Enter")
    last(page, ".canvas").evaluate(
        """async canvas => {
            const [text] = canvas.childNodes;
            getSelection().setBaseAndExtent(text, 0, text, 2);
            await new Promise((done) => setTimeout(done, 200));
            getSelection().extend(text, 3);
            canvas.parentElement.querySelector(".rewrite input").focus();
        }"""
    )
    assert sent(page, EDITS, last(page, ".fill").click)["span"] == [0, 3]


FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
        "tame": {"type": "boolean"},
        "marks": {"type": "array", "items": {"$ref": "#/$defs/mark"}, "minItems": 1, "maxItems": 2},
        "other": {"anyOf": [{"type": "null"}, {"const": 3}]},
    },
    "required": ["name", "age", "kind", "tame", "marks", "other"],
    "additionalProperties": False,
    "$defs": {"mark": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}},
}


def test_a_form_is_filled_and_valid(page):
    page.locator("#modes [value=form]").check(force=True)
    page.locator("#schema").fill(json.dumps(FORM))
    ask(page, "json name=ada age=36", "form")
    verdict = last(page, ".verdict")
    expect(verdict).to_have_text("Valid for the schema.")
    value = json.loads(last(page, ".canvas").inner_text())
    jsonschema.validate(value, FORM)
    fields = last(page, ".fields")
    assert fields.get_by_label("name").input_value() == value["name"]
    assert fields.get_by_label("age").input_value() == str(value["age"])
    assert fields.get_by_label("kind").locator("option:checked").inner_text() == value["kind"]
    assert fields.get_by_label("tame").is_checked() == value["tame"]
    assert fields.get_by_label("n", exact=True).count() == len(value["marks"])
    assert fields.get_by_label("other").input_value() == json.dumps(value["other"])
    fields.get_by_label("age").fill("500")
    expect(verdict).to_contain_text("age: ")
    fields.get_by_label("age").fill("50")
    expect(verdict).to_have_text("Valid for the schema.")
    assert json.loads(last(page, ".canvas").inner_text()) == {**value, "age": 50}


@pytest.mark.parametrize(
    ("schema", "where", "said"),
    [
        ("{", "#wrong", "The schema is no JSON"),
        ('{"type": "array", "uniqueItems": true}', ".cost.error", "uniqueItems"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_in_a_sentence(browser, server, schema, where, said):
    with browser.new_context() as tab:  # whose console tells of the refusal
        page = tab.new_page()
        page.goto(server.url)
        page.locator("#modes [value=form]").check(force=True)
        page.locator("#schema").fill(schema)
        ask(page, "json name=ada age=36", "form")
        expect(page.locator(where)).to_contain_text(said)


def test_an_image_is_seen(page):
    page.locator("#image").set_input_files(IMAGE)
    expect(page.locator("#pictures img")).to_have_count(1)
    ask(page, "colors?")
    answered(page, "yellow blue")
    expect(last(page, ".said img")).to_have_count(1)
    expect(page.locator("#pictures img")).to_have_count(0)


def test_loading_it_again_keeps_the_conversation_and_the_settings(page):
    page.locator("summary", has_text="Settings").click()
    page.locator("#decoder").select_option("speculative")
    page.locator("#max_tokens").fill("8")
    page.keyboard.press("Escape")
    expect(page.locator(".panel")).to_be_hidden()
    body = sent(page, CHAT, lambda: ask(page, "reverse abcdef"))
    assert body["decoder"] == "speculative" and body["max_tokens"] == 8
    answered(page)
    text = last(page, ".canvas").inner_text()
    page.reload()
    answered(page, text)
    body = sent(page, CHAT, lambda: ask(page, "sort 21"))
    assert [message["content"] for message in body["messages"]] == ["reverse abcdef", text, "sort 21"]
    assert body["decoder"] == "speculative"
    answered(page, count=2)
    page.locator("summary", has_text="Settings").click()
    page.locator("#clear").click()
    page.reload()
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#intro")).to_be_visible()


def test_what_the_model_writes_is_never_markup(page):
    evil = "<img src=x onerror=alert(1)><script>alert(1)</script>"
    frame = {"type": "diffusion_frame", "block": 0, "step": 1, "total": 2, "text": evil}
    frame |= {"pieces": [evil], "accepted": [False], "entropy": [1.5], "choices": [{"delta": {}}]}
    end = {"choices": [{"delta": {"content": evil, "reasoning": evil}, "finish_reason": "stop"}]}
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in (frame, end))
    page.route(CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, evil)
    answered(page, evil)
    last(page, "[type=range]").fill("0")
    assert last(page, ".canvas").inner_text() == evil and last(page, ".said").inner_text() == evil
    assert page.locator("article img, article script").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_narrow_window_and_keeps_still_where_that_is_asked_for(browser, server, theme):
    wanted = {"color_scheme": theme, "reduced_motion": "reduce", "viewport": {"width": 390, "height": 800}}
    with visit(browser, server.url, **wanted) as page:
        ask(page, "count from 17")
        answered(page, COUNTING)
        steps = last(page, "[type=range]")
        steps.press("Home")
        while not last(page, ".token.new").count():  # the first steps may accept nothing
            assert steps.input_value() != steps.get_attribute("max")
            steps.press("ArrowRight")
        assert page.evaluate("document.getAnimations().length") == 0
        steps.press("End")
        select(page, 0, 2)
        expect(last(page, ".rewrite")).to_be_visible()
        page.locator("#modes [value=form]").check(force=True)
        page.locator("summary", has_text="Settings").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        style = page.evaluate(
            "(({ backgroundColor, color }) => [backgroundColor, color])(getComputedStyle(document.body))"
        )
        ground, text = (sum(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in style)
        assert abs(ground - text) > 400 and (ground > text) == (theme == "light")


def test_a_key_is_asked_for(browser, demo_float32):
    with running(loader(demo_float32), Rules(key="secret")) as server, browser.new_context() as tab:
        page = tab.new_page()
        page.goto(server.url)
        expect(page.locator("#model")).to_contain_text("The API key is missing")
        page.locator("summary", has_text="Settings").click()
        page.locator("#key").fill("secret")
        page.locator("#key").blur()
        expect(page.locator("#model")).to_have_text("demo")
        ask(page, "reverse abc")
        answered(page, "cba")
