"""A generation as JSON lines: printed for other programs, or kept in a file and played again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import PromptError
from ..events import Commit, Done, Draft, Event, Filled, Part, Prefill, Stats, ToolCall
from ..files import Kind, explained, open_file
from .cells import printable
from .terminal import show

LONGEST_PAUSE = 1.0  # seconds that a replay waits for an event
LONGEST_LINE = 1 << 24  # bytes of a file that are looked at to see whether it is a trace
USUAL_PAUSE = 0.1  # where the file holds no times


@dataclass(frozen=True)
class Traced:
    """An event, and when it came, in seconds after the first. title: what was asked, on the first one, if known."""

    event: Event
    seconds: float
    title: str = ""


def event_json(event: Event) -> str:
    """An event as one line of JSON, with its kind in `type`: prefill, draft, filled, commit or done."""
    return _line(_fields(event))


class TraceWriter:
    """Writes the events of one request to the file at `path`, a line each, which appears when it is closed.

    Whatever ends the request, Ctrl-C too, the events until then are a trace that can be replayed; a request without
    one leaves no file. Nothing takes the file's place where writing fails. force: replace a file that is no trace, too.
    title: what was asked, for whoever looks at it later; kept with the first event.
    Raises PromptError where the file cannot be written; that is known before the first event.
    """

    def __init__(self, path: str | Path, title: str = "", *, force: bool = False):
        self.path, self.title = path, title
        self.started: float | None = None
        self._whole = open_file(path, TRACE, force=force)
        self._written = 0  # bytes of whole lines

    def write(self, event: Event) -> None:
        now = time.monotonic()
        self.started = now if self.started is None else self.started
        content = _fields(event) | {"time": round(now - self.started, 4)}
        if self.title:
            content, self.title = content | {"title": self.title}, ""
        line = (_line(content) + "\n").encode()
        try:
            with explained(self.path, TRACE):
                self._whole.file.write(line)
                self._whole.file.flush()  # so that a full disk is noticed at once, and a pipe's reader sees each event
        except PromptError:
            self._whole.drop()
            raise
        self._written += len(line)

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        """Write each of `events` and pass it on."""
        for event in events:
            self.write(event)
            yield event

    def close(self) -> None:
        """Let the file appear, unless it is empty. Raises PromptError."""
        if self._whole.file.closed:
            return
        if not self._written:
            self._whole.drop()
            return
        try:
            with explained(self.path, TRACE):
                if not self._whole.is_direct:
                    self._whole.file.truncate(self._written)  # without a line that was cut
                self._whole.keep()
        finally:
            self._whole.drop()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def read_trace(path: str | Path) -> list[Traced]:
    """Read what `TraceWriter` wrote, or the output of `--json`. A last line that was cut off is left out.

    Raises PromptError where the file is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}); give the file of a trace.") from None
    except UnicodeDecodeError:
        raise PromptError(f"{path} is not a text file; give a file that `--trace` wrote.") from None
    trace: list[Traced] = []
    *whole, rest = text.split("\n")
    for number, line in enumerate(whole or [rest], start=1):
        try:
            content = json.loads(line)
            seconds = float(content.get("time", USUAL_PAUSE * len(trace)))
            trace.append(Traced(_event(content), seconds, str(content.get("title", ""))))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise PromptError(
                f"{path} is not a trace: line {number} holds no event; give a file that `--trace` wrote."
            ) from None
    return trace


def _is_trace(path: Path) -> bool:
    """Whether the first line of the file at `path` is an event; the others may be damaged."""
    with path.open("rb") as file:
        first = file.readline(LONGEST_LINE)
    try:
        _event(json.loads(first))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return False
    return True


TRACE = Kind("a trace", _is_trace)


def replay(path: str | Path, speed: float = 1.0, *, live: bool | None = None, heat: bool = False) -> Done:
    """Play the trace at `path` in the terminal as `show` does, under what was asked; waits of more than a second are
    cut to one.

    speed: 2 is twice as fast. Raises PromptError.
    """
    if not speed > 0:
        raise PromptError(f"The speed is {speed:g}; give a number above 0.")
    trace = read_trace(path)
    if trace[0].title:
        print(f"> {printable(trace[0].title)}", file=sys.stderr)
    return show(_paced(trace, speed), live=live, heat=heat)


def _paced(trace: list[Traced], speed: float) -> Iterator[Event]:
    due, before = time.monotonic(), trace[0].seconds
    for traced in trace:
        due += min(max(traced.seconds - before, 0), LONGEST_PAUSE) / speed
        before = traced.seconds
        time.sleep(max(due - time.monotonic(), 0))
        yield traced.event


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _fields(event: Event) -> dict[str, Any]:
    content = {"type": type(event).__name__.lower()} | vars(event)
    match event:
        case Draft():
            content["entropy"] = [round(entropy, 4) for entropy in event.entropy]
        case Commit():
            content["text"] = event.text
            content["tool_calls"] = [vars(call) for call in event.tool_calls]
        case Done(_, stats):
            rates = ("prompt_tokens_per_second", "tokens_per_second", "steps_per_canvas", "tokens_per_step")
            content["stats"] = vars(stats) | {name: round(getattr(stats, name), 3) for name in rates}
    return content


def _event(content: dict[str, Any]) -> Event:
    """The event that `_fields` took apart. Raises KeyError, TypeError or ValueError where there is none."""
    match content["type"]:
        case "prefill":
            return Prefill(int(content["done"]), int(content["total"]))
        case "draft":
            return _draft(content)
        case "filled":
            return Filled(int(content["done"]), int(content["total"]))
        case "commit":
            tokens = [int(token) for token in content["tokens"]]
            calls = [
                ToolCall(str(call["name"]), dict(call["arguments"]), str(call["id"]))
                for call in content.get("tool_calls", ())
            ]
            return Commit(int(content["canvas"]), tokens, _parts(content["parts"]), int(content["steps"]), calls)
        case "done":
            stats = {field.name: content["stats"][field.name] for field in fields(Stats)}
            note, seed, data = content.get("note", ""), content.get("seed"), content.get("data")
            return Done(content["finish_reason"], Stats(**stats), note, seed, data, content.get("stop_string"))
        case kind:
            raise ValueError(f"unknown kind of event {kind!r}")


def _draft(content: dict[str, Any]) -> Draft:
    tokens = [int(token) for token in content["tokens"]]
    accepted = [bool(accepted) for accepted in content["accepted"]]
    entropy = [float(entropy) for entropy in content["entropy"]]
    pieces = [str(piece) for piece in content.get("pieces") or []]
    if not tokens or len({len(tokens), len(accepted), len(entropy), len(pieces) or len(tokens)}) > 1:
        raise ValueError("a draft needs as many tokens as marks, entropies and pieces")
    canvas, step, most = (int(content[name]) for name in ("canvas", "step", "max_steps"))
    return Draft(
        canvas, step, most, tokens, accepted, entropy, str(content["text"]), _parts(content.get("parts", ())), pieces
    )


def _parts(pairs: Iterable[Any]) -> list[Part]:
    return [(kind, str(text)) for kind, text in pairs]
