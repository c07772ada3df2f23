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
from ..events import Done, Event, FinishReason, Prefill, Stats
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
    asking = _Asking(model, processor, request, on_event or (lambda event: None))
    scores = asking.scores(spelled, noise)
    if not scores:
        return {}
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return {choice: weight / sum(weights) for choice, weight in zip(choices, weights, strict=True)}


class _Asking:
    """Asks for the choices' tokens, and reports what that took."""

    def __init__(
        self, model: DiffusionGemma, processor: Processor, request: Request, report: Callable[[Event], object]
    ) -> None:
        self.model, self.processor, self.request, self.report = model, processor, request, report
        kept = request.cache
        self.cache = model.make_cache(snapshot_bytes=0) if kept is None else kept
        self.stats = Stats(prompt_tokens=len(request.prompt.tokens))

    def scores(self, spelled: list[list[int]], noise: list[list[int]]) -> list[float]:
        """The log probability of each choice; nothing where the request was cancelled."""
        kept = self.request.cache
        reason: FinishReason = "stop"
        peak, started = PeakMemory(), time.perf_counter()
        scores: list[float] = []
        try:
            with nullcontext() if kept is None else kept.reserved():
                self._read_prompt()
                self.stats = replace(self.stats, prompt_seconds=time.perf_counter() - started)
                scores = self._read_choices(spelled, noise)
        except Cancelled:
            reason = "cancelled"
        finally:
            held = peak.stop()
        rest = time.perf_counter() - started - self.stats.prompt_seconds
        stats = replace(self.stats, denoise_seconds=rest, peak_memory_bytes=held)
        self.report(Done(reason, stats, seed=self.request.options.seed))
        return scores

    def _cancelled(self) -> bool:
        return self.request.cancelled

    def _read_prompt(self) -> None:
        prompt = self.request.prompt
        for number, done in enumerate(encode_prompt(self.model, self.cache, prompt)):
            if number == 0:
                self.stats = replace(self.stats, cached_tokens=done)
            self.report(Prefill(done, len(prompt.tokens)))
            if self._cancelled():
                raise Cancelled

    def _read_choices(self, spelled: list[list[int]], noise: list[list[int]]) -> list[float]:
        """Each choice's tokens, a token's probability being its mean over the canvases. Raises Cancelled."""
        opening = reply_opening(
            self.model, self.processor, self.request.prompt, self.cache, len(noise[0]), self._cancelled
        )
        probes = [
            _left_out(canvas, opening, own, place) for own in spelled for place in range(len(own)) for canvas in noise
        ]
        values = iter(log_probabilities(self.model, self.cache, probes, self._cancelled))
        return [sum(log_mean([next(values) for _ in noise]) for _ in own) for own in spelled]


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
