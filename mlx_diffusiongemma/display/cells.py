"""Text in the cells of a terminal: what is safe to print, how wide it is, where its rows end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.cells import cell_len, get_character_cell_size

Span = tuple[str, str]  # a style, by whatever name the caller gives it, and text without control characters

JOINER, EMOJI_STYLE = "\u200d", "\ufe0f"
TAB = 4
# Control characters as their pictures; what would turn, break or fail to encode a line as the replacement character.
UNPRINTABLE: dict[int, int | str | None] = {
    **{code: 0x2400 + code for code in range(0x20) if code not in b"\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(
        [*range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
    ),
    **dict.fromkeys([*range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD),
}


class Row(NamedTuple):
    """A row of a screen, in runs of one style."""

    runs: list[Span]

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.runs)


def printable(text: str) -> str:
    """Make every character visible that a terminal would obey; line breaks and tabs stay."""
    return text.replace("\r\n", "\n").translate(UNPRINTABLE)


def clusters(text: str) -> Iterator[tuple[str, int]]:
    """Characters that share their cells, such as a letter and its accents, and how many cells they take."""
    cluster, width = "", 0
    for character in text:
        cells = 1 if " " <= character <= "~" else get_character_cell_size(character)
        if cluster and cluster != "\n" and character != "\n" and (cells == 0 or cluster[-1] == JOINER):
            cluster += character
            width = 2 if character == EMOJI_STYLE else width
            continue
        if cluster:
            yield cluster, width
        cluster, width = character, cells
    if cluster:
        yield cluster, width


def break_rows(spans: Iterable[Span], columns: int, words: bool = False) -> list[Row]:
    """Spans one after the other in rows of at most `columns` cells, broken at line breaks and where a row is full.

    words: break full rows after a space where there is one; otherwise in the middle of a word, as terminals do.
    """
    rows: list[Row] = []
    runs: list[Span] = []  # of the row at hand
    used = 0
    for style, text in spans:
        run = ""
        for cluster, width in clusters(text.expandtabs(TAB)):
            if cluster == "\n" or used + width > columns:
                runs += [(style, run)] if run else []
                rest: list[Span] = []
                if words and cluster != "\n" and cluster != " ":
                    runs, rest = _split_at_space(runs)
                rows.append(Row(runs))
                runs, run, used = rest, "", sum(cell_len(text) for _, text in rest)
                if words and cluster == " ":
                    continue
            if cluster != "\n":
                run += cluster
                used += width
        if run:
            runs.append((style, run))
    return [*rows, Row(runs)] if runs or rows else []


def _split_at_space(runs: list[Span]) -> tuple[list[Span], list[Span]]:
    """A row up to its last space, and the rest; all of it where there is none."""
    for index in reversed(range(len(runs))):
        style, text = runs[index]
        before, space, after = text.rpartition(" ")
        if space:
            return [*runs[:index], (style, before + space)], [(style, after)] * bool(after) + runs[index + 1 :]
    return runs, []
