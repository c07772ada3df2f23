"""The interfaces of editors; whole requests as they send them are in `test_editor_requests.py`."""

import pytest
from servers import data_of, user

from mlx_diffusiongemma import GenerationOptions, edit
from mlx_diffusiongemma.server.interfaces.edits import read_region
from mlx_diffusiongemma.server.middles import find_middle

PARTS = ("abc", "hij")
FEW = GenerationOptions(seed=3, max_steps=2)


@pytest.mark.parametrize(
    "marked",
    [
        "<|fim_prefix|>abc<|fim_suffix|>hij<|fim_middle|>",
        "<fim_prefix>abc<fim_suffix>hij<fim_middle>",
        "<PRE> abc <SUF>hij <MID>",
        "[SUFFIX]hij[PREFIX]abc",
    ],
)
def test_markers_are_understood(marked):
    assert find_middle(marked, None) == find_middle("abc", "hij") == PARTS
    assert find_middle("abc", None) is None


def test_a_middle_has_its_text_where_each_client_looks(server):
    body = {
        "prompt": PARTS[0],
        "suffix": PARTS[1],
        "max_tokens": 4,
        "temperature": 0.2,
        "top_p": 1,
        "seed": 3,
        "max_steps": 2,
    }
    whole = server.post("/v1/fim/completions", **body, stream=False).json()["choices"][0]
    assert whole["text"] == whole["message"]["content"] and whole["finish_reason"] == "stop"
    chunks = data_of(server.post("/v1/fim/completions", **body, stream=True))
    first = chunks[0]["choices"][0]
    assert first["text"] == first["delta"]["content"] == whole["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_continues_empty_suffix_is_no_text(server):
    body = {"prompt": "abc", "max_tokens": 4, "stop": ["\n\n"], "seed": 3, "max_steps": 2}
    marked = server.post("/v1/fim/completions", **body, suffix="<|endoftext|>").json()
    assert marked["choices"] == server.post("/v1/fim/completions", **body).json()["choices"]


LLAMA_VIM = {
    "id_slot": 0,
    "input_prefix": "one\n",
    "input_suffix": "\nthree",
    "input_extra": [{"text": "abc", "filename": "a.txt", "time": 1}],
    "prompt": "t",
    "n_predict": 2,
    "max_steps": 4,
    "stop": [],
    "n_indent": 0,
    "top_k": 40,
    "top_p": 0.9,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 250,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_per_second", "tokens_cached", "truncated"],
}


def test_llama_vim_gets_the_fields_it_names(server):
    answer = server.post("/infill", **LLAMA_VIM).json()
    assert list(answer) == LLAMA_VIM["response_fields"]
    assert isinstance(answer["content"], str)


def test_a_warm_up_reads_and_the_next_request_does_not(server):
    body = {**LLAMA_VIM, "input_prefix": "a file of its own, read beforehand\n", "response_fields": []}
    warm = server.post("/infill", **{**body, "n_predict": 0}).json()
    assert warm["content"] == "" and warm["tokens_predicted"] == 0
    assert server.post("/infill", **body).json()["tokens_cached"] >= warm["tokens_evaluated"] - 1


def test_a_time_budget_bounds_the_steps(server):
    def steps(**more):
        body = {**LLAMA_VIM, "response_fields": [], "seed": 3, **more}
        return server.post("/infill", **body).json()["timings"]["denoising_steps"]

    assert steps(t_max_predict_ms=0.001) == steps(t_max_predict_ms=10**6, max_steps=1) < steps(t_max_predict_ms=10**6)


def test_llama_cpps_other_addresses(server):
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/props").json()["default_generation_settings"]["n_ctx"] == 4096
    tokens = server.post("/tokenize", content="abc").json()["tokens"]
    assert tokens == server.engine.loaded.processor.tokenizer.encode("abc", add_special_tokens=False)


def test_models_are_listed_wherever_they_are_looked_for(server):
    for path in ("/v1/models", "/v1/models/", "/models?x=1"):
        (model,) = server.http.get(path).json()["data"]
        assert model["id"] == "demo" and model["max_model_len"] == model["context_length"] == model["n_ctx"] == 4096
    assert server.http.get("/v1/models/any").json()["id"] == "demo"
    assert server.http.head("/").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/fim/completions", {"prompt": "", "suffix": ""}),
        ("/v1/fim/completions", {"prompt": [1, 2]}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": "a", "echo": True}),
        ("/v1/completions", {"prompt": "a", "logprobs": 3}),
        ("/v1/completions", {"prompt": [10**9]}),
        ("/infill", {"input_prefix": "a", "decoder": "autoregressive"}),
        ("/infill", {"input_extra": 3}),
        ("/v1/edit/completions", {"messages": []}),
        ("/v1/edits", {"input": "abc", "span": [2, 1]}),
        ("/v1/edits", {"input": "abc", "span": [0, 4]}),
        ("/v1/edits", {"input": "abc", "span": [1, 1], "instruction": "more"}),
        ("/v1/edits", {"input": "abc", "span": [0, 1], "strength": 0}),
        ("/v1/edits", {"input": "abc", "span": [0, 1], "decoder": "autoregressive"}),
        ("/v1/edit/completions", {"messages": [{"role": "user", "content": "no region"}]}),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(server, path, body):
    reply = server.post(path, **body)
    assert reply.status_code == 400 and reply.json()["error"]["message"].endswith(".")


MERCURY = (
    "<|recently_viewed_code_snippets|>\na\n<|/recently_viewed_code_snippets|>\n"
    "<|current_file_content|>\ncurrent_file_path: a.txt\nbefore\n"
    "<|code_to_edit|>\ncb<|cursor|>x\n<|/code_to_edit|>\nafter\n<|/current_file_content|>\n"
    "<|edit_diff_history|>\n-x\n+a\n<|/edit_diff_history|>"
)


def test_mercurys_tags_mark_a_region():
    region = read_region(MERCURY)
    assert region.text == "before\ncbx\nafter" and region.code == "cbx" and region.path == "a.txt"
    assert "-x\n+a" in region.instruction and "Seen before:\na\n" in region.instruction


def test_the_next_edit_changes_the_region_alone(server):
    reply = server.post("/v1/edit/completions", messages=user(MERCURY), seed=3, max_steps=2).json()
    content = reply["choices"][0]["message"]["content"]
    region = read_region(MERCURY)
    own = edit(*server.engine.loaded[:2], region.text, region.span, region.instruction, options=FEW)
    code = own.text.removeprefix("before\n").removesuffix("\nafter")
    assert reply["object"] == "edit.completion"
    assert content == ("None" if code == "cbx" else f"```\n{code}\n```")


COUNTING = " ".join(map(str, range(17, 47)))


def test_a_span_is_filled_so_that_it_fits_what_is_around_it(server):
    start = COUNTING.index("21")
    torn = COUNTING.replace("21 22 23", "99 98 97")
    body = {"input": torn, "span": [start, start + 8], "seed": 0}
    reply = server.post("/v1/edits", **body, messages=user("count from 17")).json()
    assert reply["choices"] == [{"index": 0, "text": COUNTING, "finish_reason": "stop"}]
    assert f"-{torn}" in reply["diff"] and f"+{COUNTING}" in reply["diff"]
    alone = server.post("/v1/edits", **body).json()["choices"][0]["text"]
    assert alone.startswith(torn[:start]) and alone.endswith(torn[start + 8 :])


def test_a_span_is_written_anew_under_an_instruction(server):
    text = "é 123 321 é"
    body = {"input": text, "span": [2, 5], "instruction": "reverse 123", "strength": 1, "seed": 3}
    reply = server.post("/v1/edits", **body, max_steps=2).json()
    options = GenerationOptions(seed=3, max_steps=2)
    own = edit(*server.engine.loaded[:2], text, (2, 5), "reverse 123", 1, options)
    assert reply["choices"][0]["text"] == own.text and reply["diff"] == own.diff
    assert own.text.startswith("é ") and own.text.endswith(" 321 é")


def test_an_edit_shows_its_steps(server):
    body = {"input": COUNTING, "span": [9, 20], "messages": user("count from 17"), "seed": 0, "stream": True}
    *chunks, last = data_of(server.post("/v1/edits", **body, frames=True))
    frames = [chunk for chunk in chunks if chunk.get("type") == "diffusion_frame"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == COUNTING
    assert last["choices"][0]["finish_reason"] == "stop" and last["diff"] == "" and last["timings"]["predicted_n"] > 0
    start, stop = frames[-1]["holes"][0]
    assert "".join(frames[-1]["pieces"][start:stop]) == COUNTING[9:20]
    assert not any("type" in chunk for chunk in data_of(server.post("/v1/edits", **body)))
