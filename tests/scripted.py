"""A model whose logits are queued, and a processor whose tokens are bytes: the loop without weights."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import mlx.core as mx

from mlx_diffusiongemma.config import FULL, LayerConfig, ModelConfig, TextConfig
from mlx_diffusiongemma.events import Reply
from mlx_diffusiongemma.model import vocabulary
from mlx_diffusiongemma.options import GenerationOptions

VOCABULARY = 128
END = 1
SIZES = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads"),
    *("num_experts", "top_k_experts", "sliding_window"),
)


class ScriptedCache:
    """Remembers what it was asked; a prefix is the list of tokens it was given.

    number: which row of a script is its own; None where it has all of them.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = number
        self.padding = None
        self.offset = 0
        self.labels: list[int] = []
        self.encoded: list[list[list[int]]] = []
        self.settled = self.released = self.rows = self.most_rows = 0

    def settle(self) -> None:
        self.settled += 1
        self.most_rows = max(self.most_rows, self.rows)

    def release(self) -> None:
        self.released += 1

    def rewind(self, tokens: int) -> int:
        return self.offset

    def snapshot(self) -> None:
        pass


class ScriptedModel:
    """`script[n]` are the logits [B, L, V] that the n-th denoising step finds; the last one repeats.

    Each cache that the model makes gets a row of the script, and is at as many steps as were settled in it.
    """

    def __init__(self, script: list[mx.array], canvas_length: int, context: int = 4096):
        sizes = dict.fromkeys(SIZES, 1)
        layer = LayerConfig(FULL, head_dim=1, num_key_value_heads=1)
        text = TextConfig(VOCABULARY, **sizes, layers=(layer,), rope_parameters={}, max_position_embeddings=context)
        self.config = ModelConfig(text, None, canvas_length)
        self.dtype = mx.float32
        self.options = GenerationOptions(
            max_steps=8,
            entropy_bound=0.1,
            t_max=0.8,
            t_min=0.4,
            stability=1,
            confidence=0.005,
            end_tokens=(END,),
            canvas_length=canvas_length,
        )
        self.script = script
        self.canvases: list[mx.array] = []
        self.conditions: list[mx.array | None] = []
        self.temperatures: list[float] = []
        self.draws: list[bool] = []
        self.caches: list[ScriptedCache] = []

    @property
    def rows_settled(self) -> int:
        """How many rows all steps computed that were not only prepared."""
        return sum(cache.settled for cache in self.caches)

    @property
    def most_rows(self) -> int:
        """Of one step."""
        return max(cache.most_rows for cache in self.caches)

    def parameters(self):
        return {}

    def make_cache(self, snapshot_bytes: int = 0) -> ScriptedCache:
        self.caches.append(ScriptedCache(len(self.caches)))
        return self.caches[-1]

    def labels(self, tokens, images=()):
        return list(tokens)

    def encode(self, tokens, cache, images=None, lengths=None):
        cache.encoded.append(tokens.tolist())
        cache.offset += tokens.shape[1]
        return mx.zeros((*tokens.shape, 1))

    def encode_chunks(self, tokens, cache, images=None, lengths=None):
        self.encode(tokens, cache)
        yield tokens.shape[1]

    def denoise(self, canvas, cache, self_conditioning=None):
        self.canvases.append(canvas)
        for own in getattr(cache, "caches", [cache]):
            own.rows = canvas.shape[0]
        self.conditions.append(self_conditioning)
        return mx.concatenate([self._found(own) for own in getattr(cache, "caches", [cache])])

    def _found(self, cache):
        logits = self.script[min(cache.settled, len(self.script) - 1)]
        return logits if cache.number is None else logits[min(cache.number, len(logits) - 1)][None]

    def read_vocabulary(self, hidden, temperature, key=None):
        self.temperatures.append(temperature)
        self.draws.append(key is not None)
        processed = hidden / (temperature[:, None, None] if isinstance(temperature, mx.array) else temperature)
        log_probabilities = processed - mx.logsumexp(processed, axis=-1, keepdims=True)
        entropy = -(mx.exp(log_probabilities) * log_probabilities).sum(-1)
        tokens = hidden.argmax(-1)
        if key is None:
            return vocabulary.Reading(tokens, None, entropy, None)
        sample = vocabulary.sample_from(processed, key)
        return vocabulary.Reading(tokens, sample, entropy, self.embed(tokens))

    def embed(self, tokens):
        return tokens[..., None].astype(mx.float32)


@dataclass
class BytePrompt:
    tokens: list[int]
    images: tuple = ()
    first_call: int = 1


class ByteProcessor:
    def prompt(self, prompt, images=(), tools=(), thinking=False):
        return BytePrompt(list(prompt.encode())) if isinstance(prompt, str) else BytePrompt(list(prompt))

    def draft_text(self, tokens):
        return bytes(tokens).decode("latin-1")

    def parse(self, tokens):
        return Reply(self.draft_text(tokens), "", [])

    def reply_parser(self, prompt=None):
        return SimpleNamespace(
            feed=lambda tokens: [("text", self.draft_text(tokens))] if tokens else [],
            preview=lambda tokens: [[("text", self.draft_text([token]))] for token in tokens] or [[]],
            finish=lambda: [],
        )


def sure(text: str, length: int, sharpness: float = 30.0, fill: int = END) -> mx.array:
    """Logits [L, V] that are certain of `text`, then of `fill`."""
    ids = [*text.encode(), *[fill] * length][:length]
    return sharpness * (mx.arange(VOCABULARY) == mx.array(ids)[:, None]).astype(mx.float32)


def unsure(length: int) -> mx.array:
    return mx.zeros((length, VOCABULARY))
