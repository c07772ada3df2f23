"""The settings that `/set` changes between turns, under the names that the options have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from ...errors import PromptError
from ..common import OF_OTHER_SAMPLERS, chosen_mode, number, whole

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
    "seed": ("seed", whole(0, 2**64 - 1)),
    "stop": ("stop", lambda text: (text,)),
}
NAMES = ("mode", *OPTIONS, "heat", "canvas")
SWITCHES = {"on": True, "off": False}
UNSET = "default"
OTHER_SAMPLERS = ("temp", "temperature", "top-p", "top-k")


def change(turns: Turns, text: str) -> str:
    """Change a setting as `text` says: its name and its new value. Returns a sentence for the user. Raises PromptError.

    Without a value, the sentence says what there is; without a name, for every setting.
    """
    name, _, value = text.partition(" ")
    name, value = name.removeprefix("--").replace("_", "-"), value.strip()
    if not name:
        return "\n".join(_said(turns, each) for each in NAMES if each != "mode")
    if name in OTHER_SAMPLERS:
        raise PromptError(OF_OTHER_SAMPLERS.format(name=name, instead="/set entropy-bound"))
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
    if name == "mode":
        chosen = chosen_mode(value)
        fields = ("max_steps", "stability", "confidence")
        turns.session.options = replace(options, **{field: getattr(chosen, field) for field in fields})
    elif name in OPTIONS:
        field, read = OPTIONS[name]
        kept = getattr(type(options)(), field) if value == UNSET else read(value)
        turns.session.options = replace(options, **{field: kept})
    elif name == "canvas" and value == UNSET:
        turns.live = None
    elif value not in SWITCHES:
        raise PromptError(f"/set {name} takes on or off, not {value}.")
    elif name == "heat":
        turns.heat = SWITCHES[value]
    else:
        turns.live = SWITCHES[value]


def _said(turns: Turns, name: str) -> str:
    if name in ("heat", "canvas"):
        switch = turns.heat if name == "heat" else turns.live
        return f"{name}: {UNSET if switch is None else 'on' if switch else 'off'}"
    options: GenerationOptions = turns.session.options
    value = getattr(options, OPTIONS[name][0])
    if name == "stop":
        return f"stop: {value[0]!r}" if len(value) == 1 else f"stop: {', '.join(map(repr, value)) or 'nothing'}"
    if value is None:
        own = getattr(turns.session.model.options, OPTIONS[name][0])
        return f"{name}: another one each time" if name == "seed" else f"{name}: {own} [the checkpoint's]"
    return f"{name}: {value}"
