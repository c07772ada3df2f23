"""Completion of commands, settings and paths in `mlx-dg chat`; imported only where prompt_toolkit is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document


class ChatCompleter(Completer):
    """Completes a command after a slash, then what it takes; a message is left alone."""

    def __init__(self, commands: Sequence[str], take_paths: Sequence[str], settings: Sequence[str]):
        self.commands, self.take_paths, self.settings = commands, take_paths, settings
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Give what may stand where the cursor is."""
        line = document.text_before_cursor
        if not line.startswith("/") or line.startswith("//"):
            return
        command, space, rest = line[1:].partition(" ")
        if not space:
            yield from _beginning(command, self.commands)
        elif command in self.take_paths:
            rest = rest.lstrip().lstrip("'\"")
            yield from self._paths.get_completions(Document(rest, len(rest)), complete_event)
        elif command == "set" and " " not in rest:
            yield from _beginning(rest, self.settings)


def _beginning(start: str, words: Sequence[str]) -> Iterable[Completion]:
    return (Completion(word, start_position=-len(start)) for word in sorted(words) if word.startswith(start))
