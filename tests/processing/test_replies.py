"""Replies from token ids: what they say, and that nothing a model can write raises or leaks."""

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from scripted import END, ByteProcessor, ScriptedModel
from templates import demo_processor

from mlx_diffusiongemma import GenerationOptions, Prompt, ToolCall, generate, load, stream
from mlx_diffusiongemma.events import Commit, Draft
from mlx_diffusiongemma.processing.replies import MARKERS, reply_from_parts
from mlx_diffusiongemma.processing.tools import parse_tool_calls

EVAL = [json.loads(line) for line in (Path(__file__).parents[1] / "data/tiny/prompts.jsonl").read_text().splitlines()]
BARRED = [name for name in MARKERS if "|" in name and not re.search("audio|video", name)]  # the demo has no such tokens
Q = '<|"|>'


@pytest.fixture(scope="module")
def processor():
    return demo_processor()


def ids(processor, text):
    return processor.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("stop", "text"), [("<", "AB"), ("B<", "A"), (("x", "<"), "AB"), ("<|", "AB<")])
def test_stop_strings_are_found_in_what_the_parser_holds_back(processor, stop, text, full):
    """Until the reply is over, a `<` at its end could begin a marker."""

    class Processor(ByteProcessor):
        draft_text = processor.draft_text

        def reply_parser(self, prompt=None):
            return processor.reply_parser()

    written = ids(processor, "AB<")
    canvas = (written * 3 if full else [*written, *[END] * 8])[:8]
    model = ScriptedModel([30.0 * (mx.arange(400) == mx.array(canvas)[:, None])[None].astype(mx.float32)], 8)
    model.config = replace(model.config, text=replace(model.config.text, vocab_size=400))
    options = GenerationOptions(stop=stop, max_tokens=len(written))
    result = generate(model, Processor(), "q", options=options)
    assert result.text == text
    assert result.finish_reason == ("length" if full and stop == "<|" else "stop")


@pytest.mark.parametrize(
    ("texts", "stop"),
    [
        (["one <", ""], ()),
        (["ok<|tool_call>call:f{}", ""], ()),
        (["ok<|tool_call>call:", "f{}<tool_call|>"], ()),
        (["<|channel>thought\nh", "m\n<channel|>yes"], ()),
        (["one E", "AT two"], ("END",)),
        (["one E", "ND two"], ("END",)),
        (["one E", ""], ("END",)),
    ],
)
def test_the_last_draft_begins_with_what_is_committed(processor, texts, stop):
    """Also where the parser or a stop string held something back at the end of a canvas."""

    class Processor(ByteProcessor):
        def reply_parser(self, prompt=None):
            return processor.reply_parser()

    first, last = (ids(processor, text) for text in texts)
    length = max(len(first), len(last) + 1)
    canvases = [[*ids(processor, "." * (length - len(first))), *first], [*last, *[END] * length][:length]]
    logits = [30.0 * (mx.arange(400) == mx.array(c)[:, None])[None].astype(mx.float32) for c in canvases]
    model = ScriptedModel([logits[0]] * 2 + [logits[1]] * 2, length)
    model.config = replace(model.config, text=replace(model.config.text, vocab_size=400))
    model.options = replace(model.options, max_steps=2)
    for event in stream(model, Processor(), "q", options=GenerationOptions(stop=stop, seed=0)):
        if isinstance(event, Draft):
            draft = event
        if isinstance(event, Commit):
            assert draft.text.startswith(event.text)
            assert "".join(draft.pieces).startswith("".join(text for _, text in event.parts))
            assert len(draft.pieces) == length


def read(processor, text):
    reply = processor.parse(ids(processor, text))
    return reply.text, reply.thinking, [(call.name, call.arguments) for call in reply.tool_calls]


@pytest.mark.parametrize("question", EVAL, ids=lambda question: str(question["id"]))
def test_what_the_reference_model_wrote(processor, question):
    """The expected fields, read from the reference's reply by regular expression; mostly the right answers too."""
    reply = question["reference"]
    thought = re.search(r"<\|channel>thought\n(.*?)\n<channel\|>", reply, re.DOTALL)
    calls = re.findall(r'<\|tool_call>call:(\w+)\{(\w+):<\|"\|>(.*?)<\|"\|>\}<tool_call\|>', reply)
    text = re.sub(
        r"<\|channel>.*<channel\|>|<\|tool_call>.*<tool_call\|>|<turn\|>|<\|tool_response>", "", reply, flags=re.S
    )
    assert read(processor, reply) == (text, thought[1] if thought else "", [(name, {k: v}) for name, k, v in calls])


def test_the_reference_is_mostly_right(processor):
    right = 0
    for question in EVAL:
        calls = [(call["name"], call["arguments"]) for call in question.get("tool_calls", [])]
        right += read(processor, question["reference"]) == (question["text"], question.get("thought", ""), calls)
    assert right == 290


CALL = f"<|tool_call>call:f{{x:{Q}y{Q}}}<tool_call|>"
F = ("f", {"x": "y"})
REPLIES = {
    "text": ("Hello.", "Hello.", "", []),
    "nothing": ("", "", "", []),
    "white space is kept": ("\n  a\n\n", "\n  a\n\n", "", []),
    "multi-byte characters": ("é 日本 😀", "é 日本 😀", "", []),
    "end": ("a<turn|>", "a", "", []),
    "after the end": ("a<turn|>\n<|turn>user\nb<|channel>thought\nc", "a", "", []),
    "eos": ("a<eos><pad>b", "a", "", []),
    "thought": ("<|channel>thought\nhm\n<channel|>a", "a", "hm", []),
    "empty thought": ("<|channel>thought\n<channel|>a", "a", "", []),
    "emptier thought": ("<|channel><channel|>a", "a", "", []),
    "header alone": ("<|channel>thought<channel|>a", "a", "", []),
    "header cut off": ("<|channel>thou", "", "", []),
    "blank thought": ("<|channel>thought\n \n\n<channel|>\na", "\na", "", []),
    "thought in lines": ("<|channel>thought\n\n a\n\n b \n<channel|>c", "c", "a\n\n b", []),
    "thought cut off": ("<|channel>thought\nhm, so", "", "hm, so", []),
    "thought without a line of its own": ("<|channel>thoughtful<channel|>a", "a", "thoughtful", []),
    "two thoughts": ("<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d", "bd", "a\nc", []),
    "thought in a thought": ("<|channel>thought\na<|channel>thought\nb<channel|>c", "c", "a\nb", []),
    "an unknown channel": ("<|channel>final\na<channel|>b", "b", "final\na", []),
    "a channel closed twice": ("<|channel>thought\na<channel|><channel|>b", "b", "a", []),
    "a channel never opened": ("a<channel|>b", "ab", "", []),
    "the word thought": ("thought\nbought", "thought\nbought", "", []),
    "call": (f"{CALL}<|tool_response>", "", "", [F]),
    "words and a call": (f"Let me see. {CALL}", "Let me see. ", "", [F]),
    "two calls": (f"{CALL}{CALL}<|tool_response>", "", "", [F, F]),
    "thought and call": (f"<|channel>thought\nhm\n<channel|>{CALL}", "", "hm", [F]),
    "call in a thought": (f"<|channel>thought\na {CALL} b<channel|>c", "c", "a\nb", [F]),
    "call in an unclosed thought": (f"<|channel>thought\na{CALL}<|tool_response>", "", "a", [F]),
    "thought in a call": ("<|tool_call>call:f{x:<|channel>thought\na<channel|>b", "b", "a", []),
    "call in a call": (f"<|tool_call>call:g{{y:{CALL}a", "a", "", [F]),
    "call cut off": (f"a<|tool_call>call:f{{x:{Q}y", "a", "", []),
    "call cut before its marker": ("a<|tool_call>call:f{x:1}", "a", "", [("f", {"x": 1})]),
    "call ended by the turn": ("<|tool_call>call:f{x:1}<turn|>a", "", "", [("f", {"x": 1})]),
    "call closed twice": (f"{CALL}<tool_call|>a", "a", "", [F]),
    "empty call": ("<|tool_call><tool_call|>a", "a", "", []),
    "not a call": ("<|tool_call>weather, please<tool_call|>a", "a", "", []),
    "the tool's answer, made up": (f"{CALL}<|tool_response>response:f{{z:1}}<tool_response|>a", "a", "", [F]),
    "an answer without a call": ("a<tool_response|>b", "ab", "", []),
    "a turn of its own": ("<|turn>model\na<turn|>", "a", "", []),
    "stray markers": (f"a<|tool>{Q}b<tool|><|think|><|image|>c<bos><unk><mask><pad>d", "abcd", "", []),
}


@pytest.mark.parametrize("case", REPLIES.values(), ids=REPLIES)
def test_reply(processor, case):
    written, text, thinking, calls = case
    assert read(processor, written) == (text, thinking, calls)


def test_a_character_cut_in_half_is_left_out(processor):
    tokens = ids(processor, "a😀")
    assert processor.parse(tokens).text == "a😀"
    assert [processor.parse(tokens[:n]).text for n in range(1, len(tokens))] == ["a", "a", "a", "a"]


def test_a_special_token_inside_a_character(processor):
    first, second = ids(processor, "é")
    pad = processor.tokenizer.pad_token_id
    assert processor.parse([first, pad, second]).text == "é"


def test_markers_spelled_out_lose_their_bars(processor):
    """`<|chan<pad>nel>` is seven ordinary tokens around one that vanishes."""
    assert read(processor, "<|chan<pad>nel>a<tu<pad>rn|>") == ("<channel>a<turn>", "", [])
    assert read(processor, f"<|tu{CALL}rn>a") == ("<turn>a", "", [F])
    assert read(processor, "<|channel>thought\n<tu<pad>rn|>a<channel|>b") == ("b", "<turn>a", [])
    assert read(processor, "a <| b <|turn c <") == ("a <| b <|turn c <", "", [])


def test_parts_keep_their_order(processor):
    parts = processor.parse(ids(processor, f"a<|channel>thought\nb<channel|>c{CALL}d")).parts
    call = f"call:f{{x:{Q}y{Q}}}"
    assert parts == [("text", "a"), ("thinking", "b"), ("text", "c"), ("tool_call", call), ("text", "d")]


def test_text_streams_as_soon_as_it_is_certain(processor):
    parser = processor.reply_parser()
    assert parser.feed(ids(processor, "<|channel>thou")) == []
    assert parser.feed(ids(processor, "ght\nso ")) == [("thinking", "so")]
    assert parser.feed(ids(processor, "it is\n<channel|>He")) == [("thinking", " it is"), ("text", "He")]
    tokens = ids(processor, "llo é<|tool_call>call:f{")
    assert parser.feed(tokens[:5]) == [("text", "llo ")]
    assert parser.feed(tokens[5:]) == [("text", "é")]
    assert parser.feed(ids(processor, "}<tool_call|> <")) == [("tool_call", "call:f{}"), ("text", " ")]
    assert parser.finish() == [("text", "<")]
    assert parser.feed(ids(processor, "more")) == []


def test_a_prompt_can_end_inside_a_thought(processor):
    weather = {"role": "assistant", "tool_calls": [ToolCall("get_weather", {"city": "lima"})]}
    messages = [{"role": "user", "content": "?"}, weather, {"role": "tool", "content": "rain"}]
    tokens = ids(processor, "It rains.\n<channel|>Take a coat.")
    thinking = processor.parse(tokens, processor.prompt(messages, thinking=True))
    assert (thinking.text, thinking.thinking) == ("Take a coat.", "It rains.")
    closed = processor.raw_prompt("<|turn>model\n<|channel>thought\n<channel|>")
    assert processor.parse(ids(processor, "a"), closed) == processor.parse(ids(processor, "a"))
    earlier = processor.raw_prompt("<|turn>model\n<|channel>thought\nhm<turn|>\n<|turn>model\n")
    assert processor.parse(ids(processor, "a"), earlier).text == "a"
    assert processor.parse(ids(processor, "a"), Prompt("", [])).text == "a"


CALLS = {
    "none": ("{}", {}),
    "numbers": ("{a:1,b:-2.5,c:1e3,d:0}", {"a": 1, "b": -2.5, "c": 1000.0, "d": 0}),
    "literals": ("{a:true,b:false,c:null}", {"a": True, "b": False, "c": None}),
    "quotes": (f"{{a:{Q}say \"hi\", 'you'{Q}}}", {"a": "say \"hi\", 'you'"}),
    "backslashes": (f"{{a:{Q}C:\\new\\u0041{Q}}}", {"a": "C:\\new\\u0041"}),
    "braces": (f"{{a:{Q}{{b:1}},]}}{Q},c:2}}", {"a": "{b:1},]}", "c": 2}),
    "lines": (f"{{a:{Q}one\ntwo\t{Q}}}", {"a": "one\ntwo\t"}),
    "white space in a string": (f"{{a:{Q} b {Q}}}", {"a": " b "}),
    "a call in a string": (f"{{a:{Q}call:g{{}}{Q}}}", {"a": "call:g{}"}),
    "empty string": (f"{{a:{Q}{Q}}}", {"a": ""}),
    "nested": (f"{{a:{{b:[1,{{c:{Q}d{Q}}},[]],e:{{}}}}}}", {"a": {"b": [1, {"c": "d"}, []], "e": {}}}),
    "dashes in keys": ("{max-tokens:7,$x.y:1}", {"max-tokens": 7, "$x.y": 1}),
    "quoted keys": (f'{{{Q}a b{Q}:1,"c:d":2}}', {"a b": 1, "c:d": 2}),
    "JSON": ('{"a": "x\\n\\"y\\"", "b": [1, 2]}', {"a": 'x\n"y"', "b": [1, 2]}),
    "white space": ("{ a : 1 ,\n b : [ 1 , 2 ] }", {"a": 1, "b": [1, 2]}),
    "NUL": (f"{{a:{Q}\x000\x00{Q},b:{Q}x{Q}}}", {"a": "\x000\x00", "b": "x"}),
    "other scripts": (f"{{città:{Q}Zürich 日本 😀{Q}}}", {"città": "Zürich 日本 😀"}),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_arguments(case):
    written, arguments = case
    assert parse_tool_calls(f"call:f{written}") == [ToolCall("f", arguments)]


@pytest.mark.parametrize("name", ["f", "get_weather", "search-files", "files.read", "mcp:files/read", "läs"])
def test_names(name):
    assert parse_tool_calls(f"call:{name}{{}}") == [ToolCall(name, {})]


def test_several_calls_in_one():
    assert parse_tool_calls("call:f{a:1}call:g{} \ncall:f{}") == [
        ToolCall("f", {"a": 1}),
        ToolCall("g", {}),
        ToolCall("f", {}),
    ]


@pytest.mark.parametrize(
    "written",
    [
        "",
        "f{}",
        "call:{}",
        "call:a b{}",
        "call:f",
        "call:f{",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:1",
        "call:f{a:1,}",
        "call:f{,}",
        "call:f{:1}",
        "call:f{a:lima}",
        "call:f{a:01}",
        "call:f{a:NaN}",
        "call:f{a:-Infinity}",
        "call:f{a:1}}",
        "call:f{a:[1}",
        "call:f{} and more",
        f"call:f{{a:{Q}b}}",
        f"call:f{{a:{Q}b{Q}c{Q}d{Q}}}",
        f"call:f{{a:{Q}b{Q}{Q}c{Q}}}",
        f"call:f{{a{Q}b{Q}:1}}",
        "call:f{a:\x000\x00}",
        "call:f{a:1}call:g{",
        "call:f{a:" + "9" * 5000 + "}",
        "call:f{a:" + "{a:" * 100_000,
        "call:f{a:" + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=lambda written: written[:24],
)
def test_a_call_that_cannot_be_read_is_none(written):
    assert parse_tool_calls(written) == []


def hostile(processor, generator):
    """One reply: ids at random, a real reply damaged, or pieces of the format in any order."""
    kind = generator.randrange(4)
    size = len(processor.tokenizer)
    if kind == 0:
        return [generator.randrange(size) for _ in range(generator.randrange(80))]
    if kind == 1:
        tokens = ids(processor, generator.choice(EVAL)["reference"])
        tokens = tokens[: generator.randrange(len(tokens) + 1)]
        return [generator.randrange(size) if generator.random() < 0.1 else token for token in tokens]
    pieces = [
        *MARKERS,
        "thought\n",
        "call:f{",
        "}",
        "a:",
        Q,
        "x",
        "\n",
        " ",
        "é😀",
        "<|",
        "|>",
        "[1,",
        '"',
        "response:f{",
    ]
    if kind == 3:  # markers spelled, with something that vanishes inside
        cuts = [(marker, generator.randrange(1, len(marker))) for marker in generator.choices(BARRED, k=9)]
        pieces = [*pieces, *(marker[:cut] + "<pad>" + marker[cut:] for marker, cut in cuts)]
    return ids(processor, "".join(generator.choices(pieces, k=generator.randrange(1, 24))))


def test_fuzz(processor):
    generator = random.Random(11)
    for number in range(6000):
        tokens = hostile(processor, generator)
        reply = processor.parse(tokens)
        for shown in (reply.text, reply.thinking):
            assert not any(marker in shown for marker in BARRED), (number, tokens)
        assert all(isinstance(call, ToolCall) for call in reply.tool_calls)
        parser, parts = processor.reply_parser(), []
        while tokens:
            cut = generator.randrange(1, 12)
            previewed = parser.preview(tokens)
            assert len(previewed) == max(len(tokens), 1)
            assert reply_from_parts([*parts, *itertools.chain.from_iterable(previewed)]) == reply, number
            parts += parser.feed(tokens[:cut])
            tokens = tokens[cut:]
        assert reply_from_parts([*parts, *parser.finish()]) == reply, number


def test_a_preview_says_which_token_adds_what(processor):
    tokens = ids(processor, "<|channel>thought\nhm ha\n<channel|>é" + CALL)
    previewed = processor.reply_parser().preview(tokens)
    assert previewed[0] == [] and previewed[-1][0][0] == "tool_call"
    assert reply_from_parts(list(itertools.chain.from_iterable(previewed))) == processor.parse(tokens)
    assert processor.reply_parser().preview([]) == [[]]


def test_fuzz_no_header_is_shown(processor):
    """Wherever a header stands right after its marker, its word stays out of the text."""
    generator = random.Random(12)
    pieces = ["<|channel>thought\n", "<|channel>thought", "<|channel>thou", *MARKERS, CALL, "a", "\n", "call:f{"]
    for _ in range(2000):
        reply = processor.parse(ids(processor, "".join(generator.choices(pieces, k=generator.randrange(1, 16)))))
        assert "thou" not in reply.text


def test_drafts_read_as_text_whatever_their_ids(processor):
    generator = random.Random(13)
    size = len(processor.tokenizer)
    for _ in range(300):
        shown = processor.draft_text([generator.randrange(size) for _ in range(64)])
        assert "\ufffd" not in shown
        assert not any(marker in shown for marker in BARRED)
    assert processor.draft_text(ids(processor, "<|channel>thought\nhm\n<channel|>é<image|><|image|>a<pad>")) == (
        "thought\nhm\néa"
    )
    assert processor.draft_text(ids(processor, "a😀")[:-1]) == "a"
    assert processor.draft_text([]) == ""


def test_drafts_of_a_thinking_reply_tell_its_parts(demo_float32):
    model, processor = load(demo_float32)
    question = next(question for question in EVAL if question["thinking"])
    prompt = processor.prompt(question["messages"], thinking=True)
    kinds = set()
    for event in stream(model, processor, prompt, max_tokens=192, seed=0):
        if isinstance(event, Draft):
            draft = event
            kinds |= {kind for kind, _ in draft.parts}
            assert draft.text == "".join(text for kind, text in draft.parts if kind == "text")
            assert "".join(draft.pieces) == "".join(text for _, text in draft.parts)
            assert len(draft.pieces) == len(draft.tokens) and "thought" not in draft.text
        if isinstance(event, Commit):
            committed = "".join(text for _, text in event.parts)
            assert committed and "".join(draft.pieces).startswith(committed)
    assert kinds == {"thinking", "text"}
