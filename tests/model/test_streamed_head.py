"""The vocabulary read in one pass changes no text: not a token differs from the plain head's, on the trained model."""

import json
from pathlib import Path

import mlx.core as mx

from mlx_diffusiongemma import generate, load
from mlx_diffusiongemma.model import vocabulary

PROMPTS = Path(__file__).parents[1] / "data" / "tiny" / "prompts.jsonl"


def plain_reader(model):
    """`read_vocabulary` by its definition, with the same uniforms."""

    def read(hidden, temperature, key=None):
        processed = model.logits(hidden) / temperature
        log_probabilities = processed - mx.logsumexp(processed, axis=-1, keepdims=True)
        entropy = -(mx.exp(log_probabilities) * log_probabilities).sum(-1)
        if key is None:
            return vocabulary.Reading(processed.argmax(-1), None, entropy, None)
        sample = vocabulary.sample_from(processed, key)
        return vocabulary.Reading(processed.argmax(-1), sample, entropy, model.soft_embedding(processed))

    return read


def test_streamed_and_plain_heads_write_the_same_text(demo_float32, monkeypatch):
    cases = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    prompts = [case["messages"] for case in cases if not case["image"] and not case["tools"]][:100]
    assert len(prompts) == 100
    model, processor = load(demo_float32)
    # Several blocks, so that running maxima and sums are really carried over.
    monkeypatch.setattr(vocabulary, "BLOCK_BUDGET", 4 * 64 * 96)
    streamed = [generate(model, processor, prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    monkeypatch.setattr(model, "read_vocabulary", plain_reader(model), raising=False)
    plain = [generate(model, processor, prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    assert [result.tokens for result in streamed] == [result.tokens for result in plain]
    assert [result.stats.steps for result in streamed] == [result.stats.steps for result in plain]
