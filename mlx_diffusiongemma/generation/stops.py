"""Stop strings: text that ends a reply without being part of it."""

from __future__ import annotations

from collections.abc import Callable

from ..events import Part


class StopStrings:
    """Looks for stop strings in the visible text, and holds back what may become one. found: the one that came."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops = stops
        self.held = ""
        self.found: str | None = None

    @property
    def held_parts(self) -> list[Part]:
        """Text that comes before the next parts, unless it becomes a stop string with them."""
        return [("text", self.held)] if self.held else []

    def take(self, tokens: list[int], feed: Callable[[list[int]], list[Part]]) -> tuple[list[int], list[Part], bool]:
        """The tokens up to a stop string, their parts without it, and whether one was found."""
        if not self.stops:
            return tokens, feed(tokens), False
        parts: list[Part] = []
        for count, token in enumerate(tokens, start=1):
            for part in feed([token]):
                if self._extend(parts, part):
                    return tokens[:count], parts, True
        return tokens, parts, False

    def rest(self, last: list[Part]) -> tuple[list[Part], bool]:
        """The text that was held back and the reply's last parts, up to a stop string, and whether one was found."""
        if not self.stops:
            return last, False
        parts: list[Part] = []
        for part in last:
            if self._extend(parts, part):
                return parts, True
        return parts + self._flush(), False

    def _flush(self) -> list[Part]:
        """Let go of what was held back: no stop string comes of it any more."""
        held = self.held_parts
        self.held = ""
        return held

    def _extend(self, parts: list[Part], part: Part) -> bool:
        """Append a part; True where a stop string was completed."""
        kind, text = part
        if kind != "text":
            parts += [*self._flush(), part]
            return False
        text = self.held + text
        found = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.found = min(found)
            self.held = ""
            parts.append(("text", text[:at]))
            return True
        keep = max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        parts.append(("text", text[: len(text) - keep]))
        return False


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that could begin `stop`."""
    return max(n for n in range(min(len(text), len(stop) - 1) + 1) if text.endswith(stop[:n]))
