"""A decoder is a way of finding the tokens of replies, several of them at once; the options name one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from .autoregressive import Autoregressive
from .diffusion import Diffusion
from .guided import Guided
from .speculative import Speculative

if TYPE_CHECKING:
    from ...events import Event
    from ...model.diffusion_gemma import DiffusionGemma
    from ...options import Settings
    from ..writer import Writer


class Decoder(Protocol):
    """Writes replies together, a row each, which come and go at any step."""

    def add(self, writer: Writer) -> Iterator[Event]:
        """Read a writer's prompt, and let its reply take part from the next step on."""
        ...

    def drop(self, leaving: Sequence[Writer]) -> None:
        """Let replies leave, whatever they are like; what they held beside their prefixes is freed."""
        ...

    def step(self) -> Iterator[tuple[Writer, Event]]:
        """Take one step of all replies, and give the events that come of it."""
        ...


def make_decoder(model: DiffusionGemma, options: Settings, *, in_grammar: bool = False) -> Decoder:
    """The decoder that `options` name. in_grammar: the one of its kind for replies that follow a grammar."""
    if in_grammar:
        return Guided(model, options)
    match options.decoder:
        case "diffusion":
            return Diffusion(model, options)
        case "autoregressive":
            return Autoregressive(model, options)
        case "speculative":
            return Speculative(model, options)
