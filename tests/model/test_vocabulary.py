"""The vocabulary read in one pass gives what its plain definition gives, and never holds the logits."""

from __future__ import annotations

import gc
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffusiongemma.model import vocabulary

CAP = 30.0
TEMPERATURE = 0.6


def random_embedding(tokens: int, hidden: int, bits: int | None = None) -> nn.Module:
    embedding = nn.Embedding(tokens, hidden)
    embedding.weight = mx.random.normal(embedding.weight.shape, key=mx.random.key(tokens))
    return embedding if bits is None else nn.QuantizedEmbedding.from_embedding(embedding, group_size=32, bits=bits)


def embedding_with_logits(logits: np.ndarray) -> tuple[nn.Embedding, mx.array]:
    """An embedding and hidden states [1, rows, rows] whose soft-capped logits are `logits` [rows, V]."""
    with np.errstate(divide="ignore"):
        raw = np.clip(CAP * np.arctanh(logits.astype(np.float64) / CAP), -1e4, 1e4)
    embedding = nn.Embedding(logits.shape[1], len(logits))
    embedding.weight = mx.array(raw.T.astype(np.float32))
    return embedding, mx.eye(len(logits))[None]


def exact_entropy(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Nats, in float64."""
    scaled = logits.astype(np.float64) / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    return np.log(np.exp(shifted).sum(-1)) - (probabilities * shifted).sum(-1)


def assert_equals_the_definition(embedding: nn.Module, hidden: mx.array) -> vocabulary.Reading:
    key = mx.random.key(5)
    reading = vocabulary.read(embedding, hidden, CAP, TEMPERATURE, key)
    logits = vocabulary.logits(embedding, hidden, CAP)
    processed = logits / TEMPERATURE
    soft = np.array(vocabulary.soft_embedding(embedding, processed))
    assert np.array_equal(reading.tokens, processed.argmax(-1))
    assert np.array_equal(reading.sample, vocabulary.sample_from(processed, key))
    np.testing.assert_allclose(reading.entropy, exact_entropy(np.array(logits), TEMPERATURE), rtol=0, atol=1e-5)
    np.testing.assert_allclose(reading.soft_embedding, soft, rtol=0, atol=2e-6 * np.abs(soft).max())
    return reading


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_modes_whose_scales_are_codes_give_embeddings_and_not_codes(mode):
    plain = random_embedding(97, 32)
    embedding = nn.QuantizedEmbedding.from_embedding(plain, mode=mode, group_size=None, bits=None)
    assert vocabulary.embedding_scale(embedding, 32).item() == pytest.approx(math.sqrt(32), rel=0.01)
    likely = mx.where(mx.arange(97) == 5, 20.0, 0.0)[None, None]
    soft = vocabulary.soft_embedding(embedding, likely)[0, 0].astype(mx.float32)
    assert mx.abs(soft - plain.weight[5]).max() < 0.3 * mx.abs(plain.weight[5]).max()


@pytest.mark.parametrize("bits", [None, 8], ids=["plain", "8-bit"])
@pytest.mark.parametrize("block", [32, 64, 512, 4096])
@pytest.mark.parametrize("tokens", [7, 32, 97, 1024, 1531])
def test_equals_the_definition(tokens, block, bits, monkeypatch):
    hidden = 1.5 * mx.random.normal((2, 12, 32), key=mx.random.key(1))
    monkeypatch.setattr(vocabulary, "BLOCK_BUDGET", 4 * 24 * block)
    assert_equals_the_definition(random_embedding(tokens, 32, bits), hidden)


@pytest.mark.parametrize("bits", [None, 8], ids=["plain", "8-bit"])
def test_more_rows_than_draw_together(bits, monkeypatch):
    hidden = 1.5 * mx.random.normal((2, 12, 32), key=mx.random.key(1))
    monkeypatch.setattr(vocabulary, "MEMBER_ROWS", 7)
    assert_equals_the_definition(random_embedding(301, 32, bits), hidden)


def test_the_groups_embeddings_are_bounded(monkeypatch):
    """Drawing for many rows holds little more than for MEMBER_ROWS: MLX runs some operations ahead of a CPU."""
    embedding, peaks = random_embedding(64, 512), []
    monkeypatch.setattr(vocabulary, "MEMBER_ROWS", 16)
    for rows in (16, 1024):
        hidden = mx.random.normal((1, rows, 512), key=mx.random.key(1))
        mx.eval(vocabulary.read(embedding, hidden, CAP, TEMPERATURE, mx.random.key(2)))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(vocabulary.read(embedding, hidden, CAP, TEMPERATURE, mx.random.key(2)))
        peaks.append(mx.get_peak_memory() - before)
    members = 16 * vocabulary.GROUP * 512 * 4
    assert peaks[1] - peaks[0] < 24 * members < 1024 // 16 * members / 2


def adversarial(tokens: int) -> dict[str, np.ndarray]:
    """Rows of logits that break careless running sums."""
    steps = np.arange(tokens)
    return {
        "uniform": np.zeros(tokens),
        "one-hot": np.where(steps == tokens // 2, CAP, -CAP),
        "one-hot at the first token": np.where(steps == 0, CAP, -CAP),
        "one-hot at the last token": np.where(steps == tokens - 1, CAP, -CAP),
        "half saturated at each end": np.where(steps % 2 == 0, CAP, -CAP),
        "all at the top": np.full(tokens, CAP),
        "all at the bottom": np.full(tokens, -CAP),
        "a tie across blocks": np.where(np.isin(steps, [3, tokens // 2, tokens - 1]), 20.0, 1.0),
        "a maximum that rises in every block": np.linspace(-29, 29, tokens),
        "a maximum that falls in every block": np.linspace(29, -29, tokens),
        "peaked, with a long tail": np.where(steps == 40, 12.0, 0.0),
    }


@pytest.mark.parametrize("block", [32, 96, 4096])
@pytest.mark.parametrize("tokens", [256, 301])
def test_adversarial_rows(tokens, block, monkeypatch):
    rows = adversarial(tokens)
    embedding, hidden = embedding_with_logits(np.stack(list(rows.values())))
    monkeypatch.setattr(vocabulary, "BLOCK_BUDGET", 4 * len(rows) * block)
    reading = assert_equals_the_definition(embedding, hidden)
    token = dict(zip(rows, reading.tokens[0].tolist(), strict=True))
    entropy = dict(zip(rows, reading.entropy[0].tolist(), strict=True))
    assert token["a tie across blocks"] == 3, "the first of equal tokens, as argmax takes it"
    assert token["uniform"] == token["all at the top"] == token["all at the bottom"] == 0
    assert token["one-hot at the last token"] == tokens - 1
    assert entropy["one-hot"] == 0.0
    assert entropy["uniform"] == pytest.approx(math.log(tokens), abs=1e-5)
    assert entropy["half saturated at each end"] == pytest.approx(math.log((tokens + 1) // 2), abs=1e-5)


@pytest.mark.parametrize("name", adversarial(301))
def test_draws_follow_the_distribution(name, monkeypatch):
    """Chi-squared of 20,000 draws, and no draw of a token that cannot occur."""
    draws = 20_000
    logits = adversarial(301)[name]
    embedding, hidden = embedding_with_logits(logits[None])
    monkeypatch.setattr(vocabulary, "BLOCK_BUDGET", 4 * draws * 64)
    positions = mx.broadcast_to(hidden, (1, draws, 1))
    reading = vocabulary.read(embedding, positions, CAP, TEMPERATURE, mx.random.key(11))
    seen = np.bincount(np.array(reading.sample).ravel(), minlength=len(logits))
    scaled = logits / TEMPERATURE
    expected = draws * np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    assert seen[expected < 1e-6].sum() == 0
    assert chi_squared_deviation(seen, expected) < 4


@pytest.mark.parametrize("possible", [1, 3, 33, 100, 150])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(possible, monkeypatch):
    """A uniform of 0, the largest below 1, or 1 itself (were it rounded up) must not land on an impossible token."""
    first = 40
    logits = np.full((1, 200), -CAP)
    logits[:, first : first + possible] = CAP
    embedding, hidden = embedding_with_logits(logits)
    processed = vocabulary.logits(embedding, hidden, CAP) / TEMPERATURE
    last = first + possible - 1
    for uniform, expected in ((0.0, first), (1 - 2**-24, last), (1.0, last)):
        monkeypatch.setattr(vocabulary, "draw_uniforms", lambda key, shape, u=uniform: mx.full((2, *shape), u))
        assert vocabulary.read(embedding, hidden, CAP, TEMPERATURE, mx.random.key(0)).sample.item() == expected
        assert vocabulary.sample_from(processed, mx.random.key(0)).item() == expected


def chi_squared_deviation(seen: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations too large chi-squared is (Wilson and Hilferty); rare tokens count as one bin."""
    rare = expected < 10
    seen, expected = (np.append(counts[~rare], counts[rare].sum()) for counts in (seen, expected))
    if expected[-1] < 1:
        assert seen[-1] < 10
        seen, expected = seen[:-1], expected[:-1]
    freedom = len(expected) - 1
    if freedom == 0:
        return 0.0
    statistic = ((seen - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_a_key_per_row_draws_each_row_by_itself():
    embedding = random_embedding(200, 32)
    hidden = 0.3 * mx.random.normal((3, 16, 32), key=mx.random.key(2))
    keys = mx.random.split(mx.random.key(3), 3)
    together = vocabulary.read(embedding, hidden, CAP, TEMPERATURE, keys)
    for row in range(3):
        alone = vocabulary.read(embedding, hidden[row : row + 1], CAP, TEMPERATURE, keys[row])
        assert np.array_equal(together.sample[row], alone.sample[0])
    assert len({tuple(row) for row in together.sample.tolist()}) == 3


def test_without_a_key_nothing_is_drawn():
    embedding, hidden = random_embedding(200, 32), mx.random.normal((1, 8, 32), key=mx.random.key(2))
    drawn = vocabulary.read(embedding, hidden, CAP, TEMPERATURE, mx.random.key(0))
    read = vocabulary.read(embedding, hidden, CAP, TEMPERATURE, None)
    assert read.sample is None and read.soft_embedding is None
    assert np.array_equal(read.tokens, drawn.tokens)
    np.testing.assert_allclose(read.entropy, drawn.entropy, rtol=0, atol=1e-6)


def test_a_draw_and_a_soft_embedding_come_without_each_other():
    embedding, hidden = random_embedding(200, 32), mx.random.normal((1, 8, 32), key=mx.random.key(2))
    both = vocabulary.read(embedding, hidden, CAP, TEMPERATURE, mx.random.key(0))
    drawn = vocabulary.read(embedding, hidden, CAP, TEMPERATURE, mx.random.key(0), condition=False)
    soft = vocabulary.read(embedding, hidden, CAP, TEMPERATURE, None, condition=True)
    assert drawn.soft_embedding is None and soft.sample is None
    assert np.array_equal(drawn.sample, both.sample)
    np.testing.assert_allclose(soft.soft_embedding, both.soft_embedding, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [None, 8], ids=["plain", "8-bit"])
def test_the_logits_never_exist(bits):
    """At the true vocabulary a canvas's float32 logits are 268 MB, and the usual steps hold five such arrays."""
    embedding = random_embedding(262_144, 64, bits)
    hidden = mx.random.normal((1, 256, 64), key=mx.random.key(2))
    mx.eval(embedding.parameters(), hidden)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(vocabulary.read(embedding, hidden, CAP, TEMPERATURE, mx.random.key(0)))
    assert mx.get_peak_memory() - before <= 130e6


@pytest.mark.parametrize("bits", [None, 8], ids=["plain", "8-bit"])
def test_reading_leaves_nothing_behind(bits, monkeypatch):
    """Blocks for one row and for two have other lengths; those of one reading must not outlive it."""
    embedding, hidden = random_embedding(256, 32, bits), mx.random.normal((1, 2, 32), key=mx.random.key(2))
    monkeypatch.setattr(vocabulary, "BLOCK_BUDGET", 4 * 2 * 32)
    mx.eval(embedding.parameters(), hidden)

    def read_both() -> tuple[int, int]:
        for rows in (1, 2):
            mx.eval(vocabulary.read(embedding, hidden[:, :rows], CAP, TEMPERATURE, None))
        gc.collect()
        return mx.get_active_memory(), sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects())

    before = read_both()
    for _ in range(1000):
        vocabulary.read(embedding, hidden[:, :1], CAP, TEMPERATURE, None)
        vocabulary.read(embedding, hidden, CAP, TEMPERATURE, None)
    assert read_both() == before


@pytest.mark.parametrize("name", ["weight", "scales", "biases"])
def test_a_changed_embedding_is_read_as_it_is_now(name):
    embedding, hidden = random_embedding(96, 32, 8), mx.random.normal((1, 2, 32), key=mx.random.key(2))
    assert_equals_the_definition(embedding, hidden)
    embedding[name][5] = embedding[name][7] + 1
    assert_equals_the_definition(embedding, hidden)
