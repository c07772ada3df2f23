"""The decoders compared on this machine: a step at several numbers of rows, a token, and whole replies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..events import Commit, Done
from ..generation.replying import stream
from ..options import DECODERS, Decoder, GenerationOptions
from .ceilings import seconds_of

if TYPE_CHECKING:
    from ..events import Stats
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor

ROWS = (16, 32, 64, 96, 128, 192, 256)
TOKENS = 16  # that one measurement of a token's time is the mean of
TEMPERATURE = 0.6


@dataclass(frozen=True)
class Replies:
    """The prompts answered by one decoder, with the checkpoint's own sampler, to their natural stop.

    steps: denoising steps of every canvas, in order. passes: causal ones. first_seconds: to the first tokens, median.
    """

    steps: list[int]
    passes: int
    tokens: int
    seconds: float
    first_seconds: float
    peak_memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def distribution(self) -> dict[int, int]:
        """Steps → canvases that took as many."""
        return dict(sorted(Counter(self.steps).items()))


@dataclass(frozen=True)
class DecoderSpeeds:
    """Seconds of a denoising step by its rows and of a token left to right, and what each decoder makes of prompts."""

    step_seconds: dict[int, float]
    token_seconds: float
    replies: dict[Decoder, Replies]

    @property
    def tokens_per_step(self) -> float:
        """Tokens left to right that take as long as a step of a whole canvas."""
        return self.step_seconds[max(self.step_seconds)] / self.token_seconds

    @property
    def recommendation(self) -> str:
        """One line: what to use here, and by how much."""
        rates = {name: own.tokens_per_second for name, own in self.replies.items()}
        best = max(rates, key=lambda name: rates[name])
        others = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items() if name != best)
        return f"Fastest on these prompts here: --decoder {best}, {rates[best]:.1f} tokens/s ({others})."

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON can hold them."""
        return {
            "step_seconds_by_rows": self.step_seconds,
            "token_seconds": self.token_seconds,
            "tokens_in_the_time_of_a_step": self.tokens_per_step,
            "replies": {
                name: {
                    "tokens": own.tokens,
                    "seconds": own.seconds,
                    "tokens_per_second": own.tokens_per_second,
                    "tokens_per_causal_pass": own.tokens_per_pass,
                }
                for name, own in self.replies.items()
            },
            "recommendation": self.recommendation,
        }


def measure_decoders(
    model: DiffusionGemma, processor: Processor, cache: Cache, prompts: Sequence[str], max_tokens: int
) -> DecoderSpeeds:
    """Measure all decoders. cache: a prefix for steps and tokens to follow, which stays as it is."""
    length = model.config.canvas_length
    rows = sorted({count for count in ROWS if count < length} | {length})
    return DecoderSpeeds(
        {count: step_seconds(model, cache, count) for count in rows},
        token_seconds(model, cache),
        {name: _replies(model, processor, prompts, max_tokens, name) for name in DECODERS},
    )


def step_seconds(model: DiffusionGemma, cache: Cache, rows: int) -> float:
    """Time a denoising step of a canvas of `rows` tokens, the vocabulary's reading included."""
    tokens = mx.random.randint(0, model.config.text.vocab_size, (1, rows), key=mx.random.key(1))
    soft, key = model.embed(tokens), mx.random.key(2)
    mx.eval(tokens, soft, key)

    def step() -> object:
        hidden = model.denoise(tokens, cache, soft)
        cache.settle()
        return model.read_vocabulary(hidden, TEMPERATURE, key)

    seconds = seconds_of(step, 0.5)
    cache.release()
    return seconds


def token_seconds(model: DiffusionGemma, cache: Cache) -> float:
    """Time a token left to right, the next one under way while it is computed, as the decoder has it."""

    def tokens() -> mx.array:
        twin, token = cache.fork(), mx.zeros((1, 1), mx.int32)
        for number in range(TOKENS + 2):
            if number == 2:  # the twin has its own buffers now
                mx.eval(token)
                times.append(time.perf_counter())
            token = model.logits(model.encode_lazily(token, twin)).argmax(axis=-1)
            mx.async_eval(token)
        mx.eval(token)
        times[-1] = time.perf_counter() - times[-1]
        return token

    times: list[float] = []
    seconds_of(tokens, 0.3)
    return sorted(times)[len(times) // 2] / TOKENS


def _replies(
    model: DiffusionGemma, processor: Processor, prompts: Sequence[str], max_tokens: int, decoder: Decoder
) -> Replies:
    found: list[Stats] = []
    firsts: list[float] = []
    for seed, prompt in enumerate(prompts):
        options = GenerationOptions(decoder=decoder, max_tokens=max_tokens, seed=seed)
        started, first = time.perf_counter(), None
        for event in stream(model, processor, prompt, options=options):
            match event:
                case Commit() if first is None:
                    first = time.perf_counter() - started
                    firsts.append(first)
                case Done(_, stats):
                    found.append(stats)
    return Replies(
        steps=[count for stats in found for count in stats.steps],
        passes=sum(stats.passes for stats in found),
        tokens=sum(stats.generated_tokens for stats in found),
        seconds=sum(stats.denoise_seconds for stats in found),
        first_seconds=sorted(firsts)[len(firsts) // 2],
        peak_memory_bytes=max(stats.peak_memory_bytes for stats in found),
    )
