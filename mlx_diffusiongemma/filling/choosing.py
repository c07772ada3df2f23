"""Decisions: how probable each of a few given replies is, without writing any."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import PromptError
from ..options import check_seed
from .gaps import text_tokens
from .scoring import Probe, empty_thought, log_probabilities, mean_probability, noise_canvases

if TYPE_CHECKING:
    from ..generation.replying import PromptLike
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor


def choose(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    options: Sequence[str],
    *,
    canvases: int = 4,
    seed: int | None = None,
) -> dict[str, float]:
    """How probable each of `options` is as what the reply to `prompt` says: {option: probability}, summing up to 1.

    Nothing is generated: the options' tokens are read off canvases of noise in one batch of forward passes, at
    temperature 1, averaged over `canvases`. Each token is scored with noise in its own place and its option's other
    tokens, and the end of the turn, in theirs. Where the model begins its replies with an empty thought, the options
    come after one. Raises PromptError.
    """
    _check(options, canvases)
    check_seed(seed)
    prepared = processor.prompt(prompt)
    turn_end = processor.tokenizer.get_vocab().get("<turn|>")
    end = model.options.end_tokens[:1] if turn_end is None else (turn_end,)
    spelled = [[*text_tokens(processor, option), *end] for option in options]
    length = model.options.canvas_length
    if max(map(len, spelled)) > length // 2:
        raise PromptError(f"An option has more than {length // 2 - 1} tokens; give shorter ones.")
    limit = model.config.text.max_position_embeddings - length
    if len(prepared.tokens) > limit:
        raise PromptError(f"The prompt has {len(prepared.tokens)} tokens; at most {limit} fit beside a canvas.")
    seed = secrets.randbits(63) if seed is None else seed
    noise = noise_canvases(seed, canvases, length, model.config.text.vocab_size)
    cache = model.make_cache()
    model.encode(mx.array([prepared.tokens]), cache, prepared.images or None)
    cache.evaluate()
    opening = empty_thought(model, processor, prepared, cache, noise)
    probes = [
        [_left_out(canvas, opening, own, place) for place in range(len(own)) for canvas in noise] for own in spelled
    ]
    values = iter(log_probabilities(model, cache, [probe for own in probes for probe in own]))
    scores = [
        sum(math.log(mean_probability([next(values) for _ in noise])) for _ in own)  # a token's mean over canvases
        for own in spelled
    ]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return {option: weight / sum(weights) for option, weight in zip(options, weights, strict=True)}


def _left_out(noise: list[int], opening: list[int], own: list[int], place: int) -> Probe:
    """Asks for the token at `place` of an option that lies after `opening` on a canvas of noise, itself left out."""
    at = len(opening) + place
    canvas = [*opening, *own, *noise[len(opening) + len(own) :]]
    canvas[at] = noise[at]
    return Probe(tuple(canvas), at, own[place])


def _check(options: Sequence[str], canvases: int) -> None:
    is_list = isinstance(options, Sequence) and not isinstance(options, str)
    if not is_list or not all(isinstance(option, str) and option for option in options):
        raise PromptError("`options` is a list of texts, none of them empty.")
    if len(options) < 2:
        raise PromptError("There is nothing to choose from; give at least two options.")
    double = next((option for option in options if options.count(option) > 1), None)
    if double is not None:
        raise PromptError(f"The option {double!r} is given twice; give each once.")
    if isinstance(canvases, bool) or not isinstance(canvases, int) or canvases < 1:
        raise PromptError(f"canvases is {canvases!r}; give a whole number of at least 1.")
