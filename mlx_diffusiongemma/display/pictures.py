"""A traced generation as pictures: an animation of its text, and a map of its entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from ..errors import PromptError
from ..events import Commit, Draft
from ..files import write_file
from .cells import Row, Span, break_rows, clusters, printable
from .picture_files import GIF
from .terminal import HEAT, draft_spans
from .trace import Traced

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _blend(first: str, second: str, share: float) -> bytes:
    """The color between two: red, green, blue."""
    pair = zip(bytes.fromhex(first[1:]), bytes.fromhex(second[1:]), strict=True)
    return bytes(round(a + (b - a) * share) for a, b in pair)


COLUMNS = 80
MOST_ROWS = 40
LONGEST_FRAME, LAST_FRAME = 1.0, 3.0  # seconds
CELL_WIDTH, LINE_HEIGHT, FONT_SIZE, MARGIN = 8.4, 20, 14, 18  # of the animations, in pixels
BACKGROUND, LABEL = "#12141c", "#8b90a3"
# From certain to uncertain, as the terminal shows them.
HEAT_COLORS = ("#e8eaf2", "#6fd3d8", "#f2d066", "#e58fd8", "#f0706a")
COLORS = {
    "title": "#9cc4ff",
    "committed": "#e8eaf2",
    "accepted": "#8fd6a0",
    "thought-committed": "#a99fc4",
    "thought-accepted": "#c08fd6",
    "noise": "#868ca3",
    "status": LABEL,
    # Entropy up to each of the limits in HEAT, of tokens that are accepted, and the same darker for the others.
    **dict(zip(("heat0", "heat1", "heat2", "heat3", "heat4"), HEAT_COLORS, strict=True)),
    **{f"unsure{n}": "#" + _blend(BACKGROUND, color, 0.6).hex() for n, color in enumerate(HEAT_COLORS)},
}
MOST_TITLE_ROWS = 3
# From certain to uncertain.
SCALE = ("#171a26", "#2b2a63", "#6a2a83", "#b3386b", "#e8653f", "#f8b53c", "#fcf6a4")
LEVELS = 32
# Of the GIF, in this order, where they are installed: fixed width first, then what knows more scripts.
FONTS = (
    "Menlo.ttc",
    "DejaVuSansMono.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
    "NotoSansCJK-Regular.ttc",
)
COLORS_OF_A_GIF = 256
SHADES = 16  # at most, of each color, down to the background, for smooth letters in a GIF
MAP_WIDTH, MAP_STEP = 768, 10  # of the map: its cells together, and the height of a step
LABEL_CELL, LABEL_CHARACTERS, LABEL_WIDTH = 12, 12, 6.3  # where tokens are named: a cell, and the longest name
GUTTER, HEADING, AXIS, LEGEND = 48, 26, 34, 44
NO_DRAFTS = "The trace has no drafts, so there is nothing to draw; trace a whole request."


@dataclass(frozen=True)
class Frame:
    """A picture of an animation and how long it is shown: rows of runs, the last one a status line.

    A run's style is a name in `COLORS`; "thought" and a space come before it where the model thinks.
    """

    rows: list[Row]
    seconds: float


def animated_svg(
    trace: list[Traced],
    columns: int = COLUMNS,
    *,
    heat: bool = False,
    title: str | None = None,
    speed: float = 1.0,
) -> str:
    """An animation of the text taking shape, for browsers and READMEs.

    heat: colour the tokens of drafts by their entropy, not by whether they are accepted. title: stands above; None is
    the trace's own, "" is none. speed: 2 is twice as fast. Raises PromptError where there are no drafts.
    """
    frames = _frames(trace, columns, heat, title, speed)
    width, height = _size(frames, columns)
    total = sum(frame.seconds for frame in frames)
    film, starts, elapsed = [], [], 0.0
    for number, frame in enumerate(frames):
        starts.append(f"{elapsed / total:.4%}{{transform:translateY({-number * height}px)}}")
        elapsed += frame.seconds
        rows = "".join(_svg_row(row, MARGIN + LINE_HEIGHT * (i + 0.75)) for i, row in enumerate(frame.rows))
        film.append(f'<g transform="translate(0 {number * height})">{rows}</g>')
    classes = "".join(f".{name}{{fill:{COLORS[name]}}}" for name in _colors(frames)) + ".thought{font-style:italic}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"<style>text{{font:{FONT_SIZE}px ui-monospace,Menlo,'DejaVu Sans Mono',monospace;white-space:pre}}{classes}"
        f"@keyframes play{{{''.join(starts)}}}.film{{animation:play {total:.2f}s step-end infinite}}"
        f"@media(prefers-reduced-motion){{.film{{animation:none;"
        f"transform:translateY({-(len(frames) - 1) * height}px)}}}}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/><g class="film">{"".join(film)}</g></svg>\n'
    )


def animated_gif(
    trace: list[Traced],
    path: str | Path,
    columns: int = COLUMNS,
    font: str | Path | None = None,
    *,
    heat: bool = False,
    title: str | None = None,
    speed: float = 1.0,
    force: bool = False,
    inputs: Sequence[str | Path] = (),
) -> None:
    """Write the animation of `animated_svg` as a GIF, for places that show no SVG.

    font: a TrueType font file, instead of the system's. Characters that no font has are drawn as boxes. force: replace
    a file that is no GIF, too. inputs: files that are being read, which it never replaces.
    Raises PromptError where there are no drafts, or the font or the file cannot be used.
    """
    from PIL import Image, ImageDraw

    frames = _frames(trace, columns, heat, title, speed)
    pen = _Pen(_fonts(font))
    palette = Image.new("P", (1, 1))
    names = _colors(frames)
    shades = min(SHADES, COLORS_OF_A_GIF // len(names))
    palette.putpalette(b"".join(_blend(BACKGROUND, COLORS[c], n / (shades - 1)) for c in names for n in range(shades)))
    images = []
    for frame in frames:
        image = Image.new("RGB", _size(frames, columns), BACKGROUND)
        draw = ImageDraw.Draw(image)
        for number, row in enumerate(frame.rows):
            pen.row(draw, row, MARGIN + LINE_HEIGHT * number)
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    durations = [round(frame.seconds * 1000) for frame in frames]
    with write_file(path, GIF, force=force, inputs=inputs) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def entropy_svg(trace: list[Traced], *, labels: bool = False, title: str | None = None) -> str:
    """A map of entropy by position (across) and step (down): a panel per canvas, each with a scale of its own.

    labels: name the token that each position ended with. title: see `animated_svg`. Raises PromptError where there are
    no drafts.
    """
    canvases: dict[int, list[Draft]] = {}
    for traced in trace:
        if isinstance(traced.event, Draft):
            canvases.setdefault(traced.event.canvas, []).append(traced.event)
    if not canvases:
        raise PromptError(NO_DRAFTS)
    positions = max(len(draft.entropy) for drafts in canvases.values() for draft in drafts)
    cell = max(LABEL_CELL if labels else 2, MAP_WIDTH // positions)
    tick = next(step for step in (2**n for n in range(32)) if positions <= 10 * step)
    panels, y = [], float(MARGIN)
    width = round(cell * positions + GUTTER + MARGIN)
    for text in _title_lines(trace, title, round((width - GUTTER - MARGIN) / LABEL_WIDTH)):
        y += LINE_HEIGHT
        panels.append(f'<text class="title" x="{GUTTER}" y="{y - 6:g}">{escape(text)}</text>')
    for canvas, drafts in canvases.items():
        rows = [draft.entropy for draft in drafts]
        top = max(map(max, rows)) or 1.0
        panels.append(_panel(f"canvas {canvas + 1}", rows, top, cell, tick, y))
        y += HEADING + MAP_STEP * len(rows) + AXIS
        if labels:
            names = [_token_name(draft, n) for draft in drafts[-1:] for n in range(len(draft.tokens))]
            panels.append(_labels(names, cell, y - AXIS / 3))
            y += LABEL_WIDTH * max(map(len, names))
        panels.append(_legend(top, y))
        y += LEGEND
    height = round(y)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"<style>text{{font:12px system-ui,sans-serif;fill:{LABEL}}}.end{{text-anchor:end}}"
        f".middle{{text-anchor:middle}}.title{{fill:{COLORS['title']}}}"
        f".token{{font:10px ui-monospace,Menlo,monospace;white-space:pre}}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>{"".join(panels)}</svg>\n'
    )


def _panel(name: str, rows: list[list[float]], top: float, cell: int, tick: int, y: float) -> str:
    """One canvas: a path per color, with a stroke for every run of positions in it, and a mark every `tick`."""
    y += HEADING
    strokes: dict[int, str] = {}
    for step, row in enumerate(rows):
        levels = [_level(entropy, top) for entropy in row]
        start = 0
        for position in range(1, len(levels) + 1):
            if position == len(levels) or levels[position] != levels[start]:
                x, width = GUTTER + start * cell, (position - start) * cell
                run = f"M{x:g} {y + MAP_STEP * (step + 0.5):g}h{width:g}"
                strokes[levels[start]] = strokes.get(levels[start], "") + run
                start = position
    paths = "".join(f'<path stroke="{_color(n)}" d="{d}"/>' for n, d in sorted(strokes.items()))
    last, bottom = len(rows), y + MAP_STEP * len(rows)
    steps = "".join(
        f'<text class="end" x="{GUTTER - 8}" y="{y + MAP_STEP * (step - 0.5) + 4:g}">{step}</text>'
        for step in sorted({1, last, *range(10, last - 1, 10)} - {2})
    )
    marks = "".join(
        f'<text class="middle" x="{GUTTER + (position + 0.5) * cell:g}" y="{bottom + 16:g}">{position}</text>'
        for position in range(0, len(rows[0]), tick)
    )
    heading = f'<text x="{GUTTER}" y="{y - 8:g}">{name}: step (down) by position (across)</text>'
    return f'{heading}<g fill="none" stroke-width="{MAP_STEP}" shape-rendering="crispEdges">{paths}</g>{steps}{marks}'


def _token_name(draft: Draft, position: int) -> str:
    """A token as a label: its text with spaces and line breaks made visible, or its id where the trace has no texts."""
    if not draft.pieces:
        return str(draft.tokens[position])
    name = printable(draft.pieces[position]).replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"


def _labels(names: list[str], cell: int, y: float) -> str:
    """The names below their positions, written downwards."""
    texts = ((GUTTER + (position + 0.5) * cell - 3, name) for position, name in enumerate(names) if name)
    return "".join(
        f'<text class="token" transform="translate({x:g} {y:g}) rotate(90)">{escape(name)}</text>' for x, name in texts
    )


def _legend(top: float, y: float) -> str:
    bar = "".join(
        f'<rect x="{GUTTER + 6 * n}" y="{y:g}" width="6" height="10" fill="{_color(n)}"/>' for n in range(LEVELS)
    )
    marks = "".join(
        f'<text class="middle" x="{GUTTER + 6 * LEVELS * share:g}" y="{y + 25:g}">{top * share**2:.2g}</text>'
        for share in (0, 0.5, 1)  # more would run into each other
    )
    return f'{bar}{marks}<text x="{GUTTER + 6 * LEVELS + 24}" y="{y + 10:g}">entropy in nats, on this canvas</text>'


def _level(entropy: float, top: float) -> int:
    """By the square root: most positions are nearly certain, and those are where differences matter."""
    return round((LEVELS - 1) * math.sqrt(min(max(entropy, 0.0), top) / top))


def _color(level: int) -> str:
    """The color of a level: one of `SCALE`, or between two of them."""
    place = level / (LEVELS - 1) * (len(SCALE) - 1)
    index = min(int(place), len(SCALE) - 2)
    return "#" + _blend(SCALE[index], SCALE[index + 1], place - index).hex()


def _frames(trace: list[Traced], columns: int, heat: bool, title: str | None, speed: float) -> list[Frame]:
    """A frame per draft and commit. All have as many rows, so that the status line stays in its place."""
    if not speed > 0:
        raise PromptError(f"The speed is {speed:g}; give a number above 0.")
    screens = list(_screens(trace, columns, heat))
    if not screens:
        raise PromptError(NO_DRAFTS)
    tallest = max(len(rows) for _, rows, _ in screens)
    ends = [seconds for seconds, _, _ in screens[1:]]
    above = [Row([("title", line)]) for line in _title_lines(trace, title, columns)]
    above += [Row([])] * bool(above)
    frames: list[Frame] = []
    for (start, rows, status), end in zip(screens, [*ends, screens[-1][0] + LAST_FRAME], strict=True):
        rows = [*above, *rows, *[Row([])] * (tallest - len(rows) + 1), Row([("status", status)])]
        longest = LONGEST_FRAME if len(frames) < len(ends) else LAST_FRAME
        shown = min(end - start, longest) / (speed if len(frames) < len(ends) else 1)
        frames.append(Frame(rows, max(shown, 0.02)))
    return frames


def _title_lines(trace: list[Traced], title: str | None, columns: int) -> list[str]:
    """The given title or the trace's own, in as many rows as there is room for; none where it is empty."""
    words = printable(" ".join((trace[0].title if title is None else title).split()))
    rows = [row.text for row in break_rows([("", f"> {words}")], columns, words=True)] if words else []
    return rows if len(rows) <= MOST_TITLE_ROWS else [*rows[: MOST_TITLE_ROWS - 1], "  …"]


def _colors(frames: list[Frame]) -> list[str]:
    """The names in `COLORS` that the frames need."""
    used = {style.split()[-1] for frame in frames for row in frame.rows for style, _ in row.runs}
    return [name for name in COLORS if name in used]


def _screens(trace: list[Traced], columns: int, heat: bool) -> Iterator[tuple[float, list[Row], str]]:
    """When each screen comes, its rows of text and its status."""
    text: list[Span] = []
    status, style = "", _heat_style if heat else _style
    for traced in trace:
        match traced.event:
            case Draft() as draft:
                status = f"canvas {draft.canvas + 1} · step {draft.step}/{draft.max_steps}"
                status += f" · entropy {draft.mean_entropy:.3f}"
                spans = _apart([*text, *draft_spans(draft, style)])
                yield traced.seconds, break_rows(spans, columns, words=True)[-MOST_ROWS:], status
            case Commit() as commit:
                text += [
                    ("thought thought-committed" if kind == "thinking" else "committed", printable(part))
                    for kind, part in commit.parts
                    if kind != "tool_call"
                ]
                yield traced.seconds, break_rows(_apart(text), columns, words=True)[-MOST_ROWS:], status


def _style(kind: str, accepted: bool, entropy: float) -> str:
    if kind == "thinking":
        return "thought thought-accepted" if accepted else "thought noise"
    return "accepted" if accepted else "noise"


def _heat_style(kind: str, accepted: bool, entropy: float) -> str:
    level = next(level for level, (limit, _) in enumerate(HEAT) if entropy <= limit)
    return ("thought " if kind == "thinking" else "") + (f"heat{level}" if accepted else f"unsure{level}")


def _apart(spans: list[Span]) -> list[Span]:
    """The spans with a line break wherever a thought ends, or begins after something else."""
    result: list[Span] = []
    for style, text in spans:
        before = result[-1] if result else (style, "\n")
        if before[0].startswith("thought ") != style.startswith("thought ") and not before[1].endswith("\n"):
            text = "\n" + text
        result.append((style, text))
    return result


def _size(frames: list[Frame], columns: int) -> tuple[int, int]:
    return round(CELL_WIDTH * columns) + 2 * MARGIN, LINE_HEIGHT * len(frames[0].rows) + 2 * MARGIN


def _svg_row(row: Row, y: float) -> str:
    """A row of text in which every run begins in its own cell, however wide the viewer's fonts are."""
    runs, column = "", 0
    for style, text in row.runs:
        x = MARGIN + CELL_WIDTH * column
        runs += f'<tspan x="{x:.1f}" class="{style}">{escape(text)}</tspan>'
        column += sum(width for _, width in clusters(text))
    return f'<text y="{y:g}">{runs}</text>' if runs else ""


def _fonts(path: str | Path | None) -> list[Font]:
    """The font at `path` or the system's, and after them Pillow's own. Raises PromptError."""
    from PIL import ImageFont

    fonts: list[Font] = []
    for name in (str(path),) if path else FONTS:
        try:
            fonts.append(ImageFont.truetype(name, FONT_SIZE))
        except OSError:
            if path:
                raise PromptError(f"{path} is not a font file that can be read; give a TrueType font.") from None
    return [*fonts, ImageFont.load_default(FONT_SIZE)]


class _Pen:
    """Writes rows of text on an image, each character in the first font that has it."""

    def __init__(self, fonts: list[Font]):
        self.fonts = fonts
        self.missing = [bytes(font.getmask("\U0010fffe")) for font in fonts]
        self.known: dict[str, int | None] = {}

    def row(self, draw: ImageDraw.ImageDraw, row: Row, y: float) -> None:
        x = float(MARGIN)
        for style, text in row.runs:
            for cluster, cells in clusters(text):
                x += self._character(draw, cluster, cells, (x, y), COLORS[style.split()[-1]])

    def _character(
        self, draw: ImageDraw.ImageDraw, cluster: str, cells: int, corner: tuple[float, float], color: str
    ) -> float:
        """Draw it and return how far it reaches."""
        index = self._font(cluster)
        if index is None:
            x, y = corner
            draw.rounded_rectangle((x + 1, y + 3, x + CELL_WIDTH * cells - 2, y + LINE_HEIGHT - 4), 2, outline=color)
            return CELL_WIDTH * cells
        font = self.fonts[index]
        draw.text(corner, cluster, fill=color, font=font)
        return CELL_WIDTH * cells if index else font.getlength(cluster)

    def _font(self, cluster: str) -> int | None:
        if cluster not in self.known:
            has = (n for n, font in enumerate(self.fonts) if bytes(font.getmask(cluster)) != self.missing[n])
            self.known[cluster] = 0 if cluster.isspace() else next(has, None)
        return self.known[cluster]
