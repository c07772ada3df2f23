"""Decisions: how probable each of a few given replies is, without writing any."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from ..checkpoints.memory import PeakMemory
from ..errors import PromptError
from ..events import Done, Event, Prefill, Stats
from ..generation.prefix import encode_prompt
from ..generation.request import make_request, request_options
from .gaps import text_tokens
from .scoring import Cancelled, Probe, log_mean, log_probabilities, noise_canvases, reply_opening

if TYPE_CHECKING:
    from ..generation.request import PromptLike, Request
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor


def choose(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    choices: Sequence[str],
    *,
    canvases: int = 4,
    seed: int | None = None,
    cache: Cache | None = None,
    cancel: threading.Event | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> dict[str, float]:
    """Say how probable each of `choices` is as the reply to `prompt`: {choice: probability}, summing up to 1.

    Nothing is generated: the choices' tokens are read off canvases of noise in one batch of forward passes, at
    temperature 1, averaged over `canvases`. Each token is scored with noise in its own place and its choice's other
    tokens, and the end of the turn, in theirs. Where the model begins its replies with an empty thought, the choices
    come after one.
    cache: kept from one call to the next, as in `generate`. Once `cancel` is set, from any thread, it returns {} within
    one pass. on_event: is told of the prompt's `Prefill` and what it all took (`Done`). Raises PromptError and
    BusyError.
    """
    _check(choices, canvases)
    request = make_request(
        model, processor, prompt, options=request_options(model, None, seed=seed), cache=cache, cancel=cancel
    )
    turn_end = processor.tokenizer.get_vocab().get("<turn|>")
    end = request.options.end_tokens[:1] if turn_end is None else (turn_end,)
    spelled = [[*text_tokens(processor, choice), *end] for choice in choices]
    length = request.options.canvas_length
    if max(map(len, spelled)) > length // 2:
        raise PromptError(f"A choice has more than {length // 2 - 1} tokens; give shorter ones.")
    noise = noise_canvases(request.options.seed, canvases, length, model.config.text.vocab_size)
    report = on_event or (lambda event: None)
    try:
        scores = _scores(model, processor, request, spelled, noise, report)
    except Cancelled:
        return {}
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return {choice: weight / sum(weights) for choice, weight in zip(choices, weights, strict=True)}


def _scores(
    model: DiffusionGemma,
    processor: Processor,
    request: Request,
    spelled: list[list[int]],
    noise: list[list[int]],
    report: Callable[[Event], object],
) -> list[float]:
    """The log probability of each choice. Raises Cancelled."""
    prompt, kept = request.prompt, request.cache
    cache, stats = kept or model.make_cache(), Stats(prompt_tokens=len(prompt.tokens))
    peak, started = PeakMemory(), time.perf_counter()
    with nullcontext() if kept is None else kept.reserved():
        for number, done in enumerate(encode_prompt(model, cache, prompt)):
            stats = stats if number else replace(stats, cached_tokens=done)
            report(Prefill(done, len(prompt.tokens)))
            if request.cancelled:
                raise Cancelled
        prefilled = time.perf_counter()
        opening = reply_opening(model, processor, prompt, cache, noise, lambda: request.cancelled)
        probes = [
            _left_out(canvas, opening, own, place) for own in spelled for place in range(len(own)) for canvas in noise
        ]
        values = iter(log_probabilities(model, cache, probes, lambda: request.cancelled))
    scores = [sum(log_mean([next(values) for _ in noise]) for _ in own) for own in spelled]  # a token's over canvases
    stats = replace(
        stats,
        prompt_seconds=prefilled - started,
        denoise_seconds=time.perf_counter() - prefilled,
        peak_memory_bytes=peak.stop(),
    )
    report(Done("stop", stats, seed=request.options.seed))
    return scores


def _left_out(noise: list[int], opening: list[int], own: list[int], place: int) -> Probe:
    """Ask for the token at `place` of a choice that lies after `opening` on a canvas of noise, itself left out."""
    at = len(opening) + place
    canvas = [*opening, *own, *noise[len(opening) + len(own) :]]
    canvas[at] = noise[at]
    return Probe(tuple(canvas), at, own[place])


def _check(choices: Sequence[str], canvases: int) -> None:
    is_list = isinstance(choices, Sequence) and not isinstance(choices, str)
    if not is_list or not all(isinstance(choice, str) and choice for choice in choices):
        raise PromptError("`choices` is a list of texts, none of them empty.")
    if len(choices) < 2:
        raise PromptError("There is nothing to choose from; give at least two choices.")
    double = next((choice for choice in choices if choices.count(choice) > 1), None)
    if double is not None:
        raise PromptError(f"The choice {double!r} is given twice; give each once.")
    if isinstance(canvases, bool) or not isinstance(canvases, int) or canvases < 1:
        raise PromptError(f"canvases is {canvases!r}; give a whole number of at least 1.")
