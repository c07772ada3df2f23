"""The settings that `/set` changes between turns, under the names that the options have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from ...errors import PromptError
from ...options import OF_MODES
from ..common import chosen_mode, number, whole
from .decoding import OF_OTHER_SAMPLERS, chosen_decoder

if TYPE_CHECKING:
    from ...options import GenerationOptions
    from .turns import Turns

# The field of GenerationOptions, and what reads it from text.
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "max-tokens": ("max_tokens", whole(1)),
    "steps": ("max_steps", whole(1)),
    "entropy-bound": ("entropy_bound", number(0)),
    "confidence": ("confidence", number(0)),
    "canvas-length": ("canvas_length", whole(1)),
    "temp": ("temperature", number(0)),
    "top-p": ("top_p", number(0, 1)),
    "top-k": ("top_k", whole(0)),
    "min-p": ("min_p", number(0, 1)),
    "repetition-penalty": ("repetition_penalty", number(0, above=True)),
    "seed": ("seed", whole(0, 2**64 - 1)),
    "stop": ("stop", lambda text: (text,)),
}
NAMES = ("decoder", "mode", *OPTIONS, "heat", "canvas")
SWITCHES = {"on": True, "off": False}
UNSET = "default"


def change(turns: Turns, text: str) -> str:
    """Change a setting as `text` says: its name and its new value. Returns a sentence for the user. Raises PromptError.

    Without a value, the sentence says what there is; without a name, for every setting.
    """
    name, _, value = text.partition(" ")
    name, value = name.removeprefix("--").replace("_", "-"), value.strip()
    if not name:
        return "\n".join(_said(turns, each) for each in NAMES if each != "mode")
    name = "temp" if name == "temperature" else name
    if name not in NAMES:
        raise PromptError(f"There is no setting {name}; they are {', '.join(NAMES)}.")
    if not value:
        if name == "mode":
            raise PromptError("/set mode needs a name: /set mode fast")
        return _said(turns, name)
    try:
        _put(turns, name, value)
    except typer.BadParameter as error:
        raise PromptError(f"/set {name}: {error}") from None
    return f"mode: {value}" if name == "mode" else _said(turns, name)


def _put(turns: Turns, name: str, value: str) -> None:
    options = turns.session.options
    if name == "decoder":
        turns.session.options = options.with_decoder(chosen_decoder("diffusion" if value == UNSET else value))
    elif name == "mode":
        chosen = chosen_mode(value)
        turns.session.options = _checked(
            replace(options, **{field: getattr(chosen, field) for field in OF_MODES}), name
        )
    elif name in OPTIONS:
        field, read = OPTIONS[name]
        kept = getattr(type(options)(), field) if value == UNSET else read(value)
        turns.session.options = _checked(replace(options, **{field: kept}), name)
    elif name == "canvas" and value == UNSET:
        turns.live = None
    elif value not in SWITCHES:
        raise PromptError(f"/set {name} takes on or off, not {value}.")
    elif name == "heat":
        turns.heat = SWITCHES[value]
    else:
        turns.live = SWITCHES[value]


def _checked(options: GenerationOptions, name: str) -> GenerationOptions:
    """These options, which setting `name` has changed. Raises PromptError where it means nothing to the decoder."""
    if not options.foreign():
        return options
    if options.decoder == "diffusion":
        raise PromptError(OF_OTHER_SAMPLERS.format(name=name, bound="/set entropy-bound", decoder="/decoder ar"))
    raise PromptError(f"{name} is about denoising, which the {options.decoder} decoder does not do as told; leave it.")


def _said(turns: Turns, name: str) -> str:
    if name in ("heat", "canvas"):
        switch = turns.heat if name == "heat" else turns.live
        return f"{name}: {UNSET if switch is None else 'on' if switch else 'off'}"
    options: GenerationOptions = turns.session.options
    if name == "decoder":
        return f"decoder: {options.decoder}"
    value = getattr(options, OPTIONS[name][0])
    if name == "stop":
        return f"stop: {value[0]!r}" if len(value) == 1 else f"stop: {', '.join(map(repr, value)) or 'nothing'}"
    if value is None:
        own = getattr(turns.session.model.options, OPTIONS[name][0])
        return f"{name}: another one each time" if name == "seed" else f"{name}: {own} [the checkpoint's]"
    return f"{name}: {value}"
