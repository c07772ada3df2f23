"""A request: one prompt and how to answer it, checked before anything is computed."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import CanvasError, PromptError
from ..options import GenerationOptions, Settings
from .canvas import Canvas

if TYPE_CHECKING:
    from ..model.cache import Cache
    from ..model.diffusion_gemma import DiffusionGemma
    from ..processing.processor import Processor, Prompt

    PromptLike = str | Sequence[dict[str, Any]] | Sequence[int] | Prompt


@dataclass(frozen=True)
class Request:
    """All that a reply, a filling or a decision is asked for with, checked and complete.

    canvas: what to start from instead of noise. cache: a prefix that is kept from one request to the next; None is one
    of the request's own. cancel: once set, from any thread, the request ends within one step.
    """

    prompt: Prompt
    options: Settings
    canvas: Canvas = field(default_factory=lambda: Canvas([]))
    cache: Cache | None = None
    cancel: threading.Event | None = None

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()


def make_request(
    model: DiffusionGemma,
    processor: Processor,
    prompt: PromptLike,
    *,
    images: Sequence[Any] = (),
    tools: Sequence[Any] = (),
    thinking: bool = False,
    canvas: Canvas | None = None,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    cancel: threading.Event | None = None,
) -> Request:
    """Check what a caller asks for and fill in what was left open.

    Raises PromptError where prompt, options or cache cannot be used, CanvasError where the canvas cannot, BusyError
    where the cache is in use.
    """
    text = model.config.text
    prepared = processor.prompt(prompt, images=images, tools=tools, thinking=thinking)
    settings = request_options(model, options, max_tokens, seed)
    if canvas is not None and settings.decoder != "diffusion":
        raise CanvasError(
            f"A canvas to start from is for the diffusion decoder, not the {settings.decoder} one; leave it out."
        )
    canvas = canvas or Canvas([])
    canvas.check(text.vocab_size)
    if len(canvas.tokens) > settings.max_tokens:
        raise CanvasError(
            f"The canvas has {len(canvas.tokens)} tokens, more than max_tokens={settings.max_tokens}; raise it."
        )
    if not prepared.tokens:
        raise PromptError("The prompt is empty; give at least one token.")
    limit = text.max_position_embeddings
    least = 1 if settings.decoder == "autoregressive" else settings.canvas_length
    if len(prepared.tokens) + least > limit:
        beside = "a token after it" if least == 1 else f"a canvas of {least}"
        raise PromptError(
            f"The prompt has {len(prepared.tokens)} tokens; with {beside}, at most {limit - least} fit this model's "
            f"context of {limit}."
        )
    if cache is not None:
        with cache.reserved():
            if cache.config != text or cache.padding is not None or len(cache.labels) != cache.offset:
                raise PromptError(
                    "This cache holds a batch, or prompts of another model; give one of model.make_cache()."
                )
    return Request(prepared, settings, canvas, cache, cancel)


def request_options(
    model: DiffusionGemma,
    options: GenerationOptions | None,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> Settings:
    """The options that a request runs with: its own, then the checkpoint's, and a seed. Raises PromptError."""
    options = options or GenerationOptions()
    for name in options.foreign(model.options):
        others = "causal decoders" if options.decoder == "diffusion" else "diffusion decoder"
        raise PromptError(
            f"{name} is an option of the {others} and means nothing to the {options.decoder} one; leave it out."
        )
    filled = options.filled_from(model.options)
    if max_tokens is not None:
        filled = replace(filled, max_tokens=max_tokens)
    seed = filled.seed if seed is None else seed
    settings = Settings(**{**vars(filled), "seed": secrets.randbits(63) if seed is None else seed})
    longest = model.config.canvas_length
    if settings.canvas_length > longest:
        raise PromptError(f"canvas_length is {settings.canvas_length}, but this model's canvas has {longest} tokens.")
    return settings
