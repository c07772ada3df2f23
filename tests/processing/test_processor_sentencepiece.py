"""Checkpoints whose tokenizer is a SentencePiece model and nothing else."""

import json
import shutil
from dataclasses import replace

import pytest
import sentencepiece
from templates import DEMO

from mlx_diffusiongemma import CheckpointError, ModelConfig, Processor, ToolCall
from mlx_diffusiongemma.processing.replies import MARKERS
from mlx_diffusiongemma.processing.tools import QUOTE

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today?",
    "def mean(xs): return sum(xs) / len(xs)",
    "it rains in lima and snows in paris: 0123456789",
] * 20
TEXTS = ["the quick brown fox", "  two  spaces\n\nand naïve 日本 😀", "don't {stop}", "x" * 40, "a\tb <mask> c"]
NAMED = ("<pad>", "<eos>", "<bos>", "<unk>")
ADDED = [name for name in MARKERS if name not in (*NAMED, "<mask>")]
WRITTEN = '<|channel>thought\nhm\n<channel|>naïve 😀 <|tool_call>call:f{x:<|"|>two words<|"|>}<tool_call|><turn|>b'


def train(directory, pieces):
    """A byte-fallback BPE model as Gemma's are made, `pieces` among its symbols."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<mask>", *pieces],
        minloglevel=2,
        **{f"{name[1:-1]}_id": number for number, name in enumerate(NAMED)},
        **{f"{name[1:-1]}_piece": name for name in NAMED},
    )
    (directory / "tokenizer.vocab").unlink()
    shutil.copy(DEMO / "chat_template.jinja", directory)
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def configure(directory, **settings):
    tokens = {f"{name[1:-1]}_token": name for name in (*NAMED, "<mask>")}
    content = {"tokenizer_class": "GemmaTokenizer", **tokens, **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


def added_tokens(ids):
    return {str(token): {"content": name, "special": True} for token, name in zip(ids, ADDED, strict=True)}


def load(directory):
    config = ModelConfig.from_directory(DEMO)
    return Processor.from_directory(directory, replace(config, text=replace(config.text, vocab_size=512)))


def check(processor, model):
    """Text becomes the ids that SentencePiece makes of it, and reads back, streaming, as what it was."""
    for text in TEXTS:
        tokens = processor.tokenizer.encode(text, add_special_tokens=False)
        assert tokens == model.encode(text)
        assert processor.tokenizer.decode(tokens) == text
        assert processor.parse(tokens).text == text.replace("<mask>", "")
        assert processor.draft_text(tokens[:-1]) in text.replace("<mask>", "")
    prompt = processor.prompt("hello", thinking=True)
    assert prompt.tokens[:2] == [model.bos_id(), processor.tokenizer.convert_tokens_to_ids("<|turn>")]
    assert processor.tokenizer.decode(prompt.tokens) == prompt.text
    reply = processor.parse(processor.tokenizer.encode(WRITTEN, add_special_tokens=False))
    assert (reply.text, reply.thinking) == ("naïve 😀 ", "hm")
    assert reply.tool_calls == [ToolCall("f", {"x": "two words"})]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"extra_special_tokens": ["<|video|>", "<|more|>"]},
        {"extra_special_tokens": {"video_token": "<|video|>"}},
        {"additional_special_tokens": ["<|turn>", "<turn|>"]},
        {"sot_token": "<|turn>", "eot_token": "<turn|>", "escape_token": QUOTE},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ],
)
def test_markers_are_pieces_of_the_model(tmp_path, settings):
    model = train(tmp_path, ADDED)
    configure(tmp_path, **settings)
    processor = load(tmp_path)
    assert [processor.tokenizer.convert_tokens_to_ids(name) for name in ADDED] == model.piece_to_id(ADDED)
    check(processor, model)


def test_markers_replace_unused_pieces(tmp_path):
    model = train(tmp_path, [f"<unused{n}>" for n in range(len(ADDED))])
    ids = [model.piece_to_id(f"<unused{n}>") for n in range(len(ADDED))]
    configure(tmp_path, added_tokens_decoder=added_tokens(ids))
    processor = load(tmp_path)
    assert [processor.tokenizer.convert_tokens_to_ids(name) for name in ADDED] == ids
    check(processor, model)


def test_markers_follow_the_model(tmp_path):
    model = train(tmp_path, [])
    ids = list(range(model.vocab_size(), model.vocab_size() + len(ADDED)))
    configure(tmp_path, added_tokens_decoder=added_tokens(ids))
    processor = load(tmp_path)
    assert [processor.tokenizer.convert_tokens_to_ids(name) for name in ADDED] == ids
    check(processor, model)


def test_no_tokenizer_config(tmp_path):
    model = train(tmp_path, ADDED)
    check(load(tmp_path), model)


def test_the_checkpoint_is_left_as_it_was(tmp_path):
    train(tmp_path, ADDED)
    before = sorted(path.name for path in tmp_path.iterdir())
    load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_ids_that_do_not_fit_the_model_are_refused(tmp_path):
    train(tmp_path, ADDED)
    configure(tmp_path, added_tokens_decoder={"7": {"content": "<turn|>", "special": True}})
    with pytest.raises(CheckpointError, match=r"puts '<turn\|>' at id 7") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\x05"])
def test_a_damaged_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer cannot be read") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
