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
    from ..processing.grammars.compiling import Grammar
    from ..processing.processor import Processor, Prompt

    PromptLike = str | Sequence[dict[str, Any]] | Sequence[int] | Prompt


@dataclass(frozen=True)
class Request:
    """All that a reply, a filling or a decision is asked for with, checked and complete.

    canvas: what to start from instead of noise. cache: a prefix that is kept from one request to the next; None is one
    of the request's own. grammar: what the reply has to be like. cancel: once set, from any thread, the request ends
    within one step.
    """

    prompt: Prompt
    options: Settings
    canvas: Canvas = field(default_factory=lambda: Canvas([]))
    cache: Cache | None = None
    grammar: Grammar | None = None
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
    schema: Any = None,
    grammar: str | None = None,
    tool_choice: str | None = None,
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
    in_grammar = any(given is not None for given in (schema, grammar, tool_choice))
    settings = request_options(model, options, max_tokens, seed, in_grammar=in_grammar)
    if canvas is not None and in_grammar:
        raise CanvasError("A canvas to start from cannot follow a grammar; leave out one of the two.")
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
    least = settings.canvas_length if settings.decoder == "diffusion" and not in_grammar else 1
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
    made = None
    if in_grammar:
        asked = {"schema": schema, "grammar": grammar, "tool_choice": tool_choice}
        made = processor.grammar(prepared, settings.end_tokens, **asked)
    return Request(prepared, settings, canvas, cache, made, cancel)


def request_options(
    model: DiffusionGemma,
    options: GenerationOptions | None,
    max_tokens: int | None = None,
    seed: int | None = None,
    *,
    in_grammar: bool = False,
) -> Settings:
    """The options that a request runs with: its own, then the checkpoint's, and a seed. Raises PromptError.

    in_grammar: under one, the diffusion decoder's canvases are drafts, so the causal decoders' options apply as well.
    """
    options = options or GenerationOptions()
    if in_grammar and options.decoder == "diffusion":
        for name in replace(options, decoder="speculative").foreign(model.options):
            if name in ("stability", "confidence", "active_rows"):
                raise PromptError(f"{name} means nothing under a grammar, where canvases are drafts; leave it out.")
    else:
        _check_foreign(options, model.options)
    filled = options.filled_from(model.options)
    if max_tokens is not None:
        filled = replace(filled, max_tokens=max_tokens)
    seed = filled.seed if seed is None else seed
    settings = Settings(**{**vars(filled), "seed": secrets.randbits(63) if seed is None else seed})
    longest = model.config.canvas_length
    if settings.canvas_length > longest:
        raise PromptError(f"canvas_length is {settings.canvas_length}, but this model's canvas has {longest} tokens.")
    return settings


def _check_foreign(options: GenerationOptions, checkpoint: GenerationOptions) -> None:
    """Raises PromptError where an option is set that means nothing to the decoder."""
    for name in options.foreign(checkpoint):
        others = "causal decoders" if options.decoder == "diffusion" else "diffusion decoder"
        raise PromptError(
            f"{name} is an option of the {others} and means nothing to the {options.decoder} one; leave it out."
        )


def canvas_options(model: DiffusionGemma, options: GenerationOptions | None, seed: int | None = None) -> Settings:
    """The options of a request that can only be denoised. Raises PromptError where they name another decoder."""
    settings = request_options(model, options, seed=seed)
    if settings.decoder != "diffusion":
        raise PromptError(
            f"Text is filled in on a canvas, which the {settings.decoder} decoder does not do; leave decoder out."
        )
    return settings
