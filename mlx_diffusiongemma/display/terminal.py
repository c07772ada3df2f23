"""A generation seen in a terminal: the reply on stdout, and on stderr the canvas while it is being denoised."""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from ..events import Commit, Done, Draft, Event, Filled, PartKind, Prefill, Stats
from .cells import Row, Span, break_rows, printable
from .typed import unechoed

if TYPE_CHECKING:
    from ..options import GenerationOptions


FRAME_SECONDS = 0.05
RESET, NOISE = "\x1b[0m", "\x1b[2m"
# From cool to hot, each up to an entropy in nats, in the colors of the terminal's own theme. ln(vocabulary) is 12.5.
HEAT = ((0.01, ""), (0.1, "\x1b[36m"), (0.5, "\x1b[33m"), (1.5, "\x1b[35m"), (math.inf, "\x1b[31m"))


def show(
    events: Iterable[Event],
    *,
    live: bool | None = None,
    heat: bool = False,
    options: GenerationOptions | None = None,
) -> Done:
    """Play `events` to the end: the reply's text goes to stdout as it is committed, all else to stderr.

    live, heat, options: see `View`. On a terminal, the reply ends with a line break.
    """
    with View(live=live, heat=heat, options=options) as view:
        for event in events:
            view(event)
    return view.done


def statistics_line(stats: Stats, columns: int | None = None) -> str:
    """Say what a request cost: in one line, or as many as it takes in so many columns, broken between its parts.

    columns: None is the width of the terminal on stderr, where there is one.
    """
    if columns is None:
        columns = _size(sys.stderr)[0] if sys.stderr.isatty() else sys.maxsize
    prompt = f"prompt {_count(stats.prompt_tokens, 'token')}"
    if stats.cached_tokens:
        prompt += f" ({stats.cached_tokens} cached)"
    parts = [
        prompt + _rate(stats.prompt_tokens_per_second),
        _count(stats.generated_tokens, "token") + _rate(stats.tokens_per_second),
    ]
    if stats.steps:
        parts.append(f"{_count(len(stats.steps), 'canvas', 'canvases')}, {stats.steps_per_canvas:.1f} steps each")
        if stats.passes >= len(stats.steps):  # each was verified
            parts.append(f"{stats.tokens_per_pass:.1f} tokens a causal pass")
    if stats.retries:
        parts.append(_count(stats.retries, "retry", "retries"))
    if stats.peak_memory_bytes:
        gigabytes = stats.peak_memory_bytes / 1e9
        parts.append(f"peak {gigabytes:.1f} GB" if gigabytes >= 1 else f"peak {gigabytes * 1000:.0f} MB")
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(joined) <= columns:
            lines[-1] = joined
        else:
            lines += textwrap.wrap(part, columns)
    return "\n".join(lines).lstrip("\n")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _rate(per_second: float) -> str:
    if not per_second:
        return ""
    return f", {per_second:.0f} tok/s" if per_second >= 100 else f", {per_second:.1f} tok/s"


def _size(stream: TextIO) -> tuple[int, int]:
    """Columns and lines of the terminal that `stream` writes to; of a usual one where it does not say."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except OSError:
        columns, lines = 0, 0
    return max(columns or 80, 2), max(lines or 24, 2)


def _can_draw(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def draft_spans(draft: Draft, style: Callable[[PartKind, bool, float], str]) -> list[Span]:
    """A draft for `break_rows`, thoughts and calls too.

    style: names one, from the kind of part that a token belongs to, whether it is accepted and its entropy in nats.
    """
    if not draft.pieces:
        return [(style("text", True, 0.0), printable(draft.text))]
    spans: list[Span] = []
    ends = [len(text) for _, text in draft.parts]
    part, read = 0, 0  # of the parts, and of the characters of this one
    for piece, accepted, entropy in zip(draft.pieces, draft.accepted, draft.entropy, strict=True):
        while part + 1 < len(ends) and read >= ends[part]:
            read, part = read - ends[part], part + 1
        read += len(piece)
        kind = draft.parts[part][0] if draft.parts else "text"
        wanted, text = style(kind, accepted, entropy), printable(piece)
        if spans and spans[-1][0] == wanted:
            text = spans.pop()[1] + text
        spans.append((wanted, text))
    return spans


class View:
    """A generation as it is seen: the reply's unfinished last line, the draft that continues it, and a status line.

    It is called with every event, and used in a `with` statement, which leaves the screen clean whatever happens.

    live: draw the canvas in place below the text; None: where stdout and stderr are both terminals and NO_COLOR is not
    set. Otherwise a terminal on stderr gets one line of progress, and anything else nothing. heat: colour tokens by
    their entropy. options: what the request runs with; lets the temperature be shown. passing: the text is shown only
    while it is made; stdout, which need not be a terminal then, gets nothing.
    """

    def __init__(
        self,
        *,
        live: bool | None = None,
        heat: bool = False,
        options: GenerationOptions | None = None,
        passing: bool = False,
    ):
        self.out, err = sys.stdout, sys.stderr
        if live is None:
            live = _can_draw(err) and (passing or _can_draw(self.out)) and not os.environ.get("NO_COLOR")
        self.live, self.heat, self.options, self.passing = live, heat, options, passing
        self.done = Done("cancelled", Stats())  # until the request says how it ended
        self.region = _Region(err) if live or _can_draw(err) else None
        # A terminal obeys control characters; a file gets the reply as it is.
        self.tame = passing or self.out.isatty()
        self.line = ""  # of the reply: not on stdout yet, so that the region can be drawn below what is
        self.at_line_start = True
        self.draft: Draft | None = None
        self.status = [""]  # the most important part first
        self.steps = 0  # of the canvases before this one
        self.tokens = 0  # committed
        self.drawn_at = -math.inf
        self.behind = False
        self.filled: Filled | None = None
        self.filled_at = self.filling_since = 0.0
        self._quiet = ExitStack()

    def __enter__(self) -> View:
        if self.region:
            self._quiet.enter_context(unechoed())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Prefill(done, total):
                self.status = [f"prompt {done}/{total}"]
                self._refresh()
            case Draft():
                self.draft = event
                self.status = self._progress(event)
                self._refresh()
            case Filled():
                self.filled_at = time.monotonic()
                self.filling_since = self.filled_at if event.done == 0 else self.filling_since
                self.filled = event
            case Commit():
                if self.behind:
                    self._draw()
                self.tokens += len(event.tokens)
                if not self.draft:  # it is written left to right
                    self.status = [_count(self.tokens, "token")]
                self.draft = None
                self.steps += event.steps
                self._write(event.text)
                if self.tame:
                    self._draw()
                elif self.region:  # the reader of the pipe may write to the same terminal: leave it alone
                    self.region.release()
            case Done():
                self.done = event

    def close(self) -> None:
        """Leave nothing but the reply on the screen, and the cursor on a new line."""
        if self.region:
            self.region.erase()
        try:
            self._print("" if self.passing else self.line)
            if self.tame and not self.at_line_start:
                self._print("\n")
        finally:  # stdout may be gone
            self._quiet.close()
            if self.region:
                self.region.release()

    def _write(self, text: str) -> None:
        self.line += printable(text) if self.tame else text
        whole = self.line.rfind("\n") + 1 if self.region and self.tame else len(self.line)
        if whole and self.region and not self.passing:
            self.region.erase()
        self._print("" if self.passing else self.line[:whole])
        self.line = self.line[whole:]

    def _print(self, text: str) -> None:
        if text:
            self.out.write(text)
            self.out.flush()
            self.at_line_start = text.endswith("\n")

    def _refresh(self) -> None:
        self.behind = time.monotonic() - self.drawn_at < FRAME_SECONDS
        if not self.behind:
            self._draw()

    def _draw(self) -> None:
        if not self.region:
            return
        columns, lines = self.region.size()
        line = break_rows([("", self.line)], columns)
        rows = break_rows(self._spans(), columns)
        excess = max(len(rows) + 1 - lines, 0)  # the top of a long line gives way first, then the draft's end
        rows = rows[min(excess, max(len(line) - 1, 0)) :][: lines - 1]
        self.region.draw([*rows, _fitting(self.status, columns - 1)])
        self.drawn_at, self.behind = time.monotonic(), False

    def _spans(self) -> list[Span]:
        line = ("", self.line)
        if not self.live or not self.draft:
            return [line]
        return [line, *draft_spans(self.draft, self._style)]

    def _style(self, kind: PartKind, accepted: bool, entropy: float) -> str:
        warmth = next(style for limit, style in HEAT if entropy <= limit) if self.heat else ""
        return warmth if accepted else NOISE + warmth

    def _progress(self, draft: Draft) -> list[str]:
        parts = [*self._holes(), f"canvas {draft.canvas + 1}", f"step {draft.step}/{draft.max_steps}"]
        parts.append(f"entropy {draft.mean_entropy:.3f}")
        if self.options and self.options.t_min is not None and self.options.t_max is not None:
            from ..generation.sampling import temperature

            value = temperature(draft.step, draft.max_steps, self.options.t_min, self.options.t_max)
            parts.append(f"temperature {value:.2f}")
        if self.steps:
            parts.append(f"{self.steps + draft.step} steps so far")
        return parts

    def _holes(self) -> list[str]:
        """How many holes are filled, and how long the others take if they go as these; nothing for a single one."""
        if self.filled is None or self.filled.total < 2:
            return []
        parts = [f"{self.filled.done}/{self.filled.total} holes"]
        if self.filled.done:
            each = (self.filled_at - self.filling_since) / self.filled.done
            left = each * (self.filled.total - self.filled.done) - (time.monotonic() - self.filled_at)
            parts.append(f"about {_duration(left)} left")
        return parts


def _fitting(parts: list[str], columns: int) -> Row:
    """Join as many of `parts` as a row holds."""
    text = parts[0][:columns]
    for part in parts[1:]:
        if len(text) + len(" · ") + len(part) > columns:
            break
        text += f" · {part}"
    return Row([("", text)])


def _painted(row: Row) -> str:
    return "".join(style + text + RESET if style else text for style, text in row.runs)


class _Region:
    """Rows at the bottom of a terminal that are replaced in place, each frame in one write.

    The cursor stays at the end of the last row, and is hidden only within a frame: whatever ends the process, it is
    there. Automatic wrapping is off within a frame, so that a character wider than expected cannot shift the rows.

    A terminal that becomes smaller wraps the rows and pushes the top ones out, beyond reach; where it becomes larger
    again, most bring them back. So those pushed out are remembered, to be erased when they return.
    """

    BEGIN, END = "\x1b[?2026h\x1b[?25l", "\x1b[?25h\x1b[?2026l"
    NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"
    ERASE_ROW, ERASE_BELOW = "\x1b[K", "\x1b[J"

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.rows: list[Row] = []
        self.pushed_out: list[Row] = []  # above them, and above the screen, whose top they begin at then
        self.columns = 0

    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal."""
        return _size(self.stream)

    def draw(self, rows: list[Row]) -> None:
        """Replace what is there."""
        body = "\r\n".join(self.ERASE_ROW + _painted(row) for row in rows)
        self._send(self.BEGIN + self._to_top() + self.NO_WRAP + body + self.ERASE_BELOW + self.WRAP + self.END)
        self.rows, self.columns = rows, self.size()[0]

    def erase(self) -> None:
        """Take the rows away, to write something above the next ones; the screen shows it with the next `draw`."""
        if not self.rows:  # what stands there is someone else's
            return
        # Erasing a whole screen makes tmux keep it in its history; from the second column on, it is not a whole one.
        self._send(self.BEGIN + self._to_top() + self.ERASE_ROW + "\x1b[C" + self.ERASE_BELOW + "\r")
        self.rows, self.pushed_out = [], []  # what is written next may scroll: later, other rows would return

    def release(self) -> None:
        """Let the screen show what it holds, with the cursor on it."""
        self._send(self.WRAP + self.END)

    def _to_top(self) -> str:
        columns, lines = self.size()
        rows = self.pushed_out + self.rows
        if columns < self.columns:  # the terminal has wrapped the rows since
            rows = [part for row in rows for part in break_rows([("", row.text)], columns) or [row]]
        self.pushed_out = rows[: max(len(rows) - lines, 0)]
        up = min(len(rows), lines) - 1
        return f"\r\x1b[{up}A" if up > 0 else "\r"

    def _send(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
