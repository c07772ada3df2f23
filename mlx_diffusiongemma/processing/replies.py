"""Replies taken apart, from token ids: text, thoughts and tool calls.

A reply is written with marker tokens:

    <|channel>thought\\n…\\n<channel|>      a thought; often an empty one, even where no thinking was asked for
    <|tool_call>call:NAME{…}<tool_call|>    a call; `<|tool_response>` after the last one hands over to the tools
    <turn|>                                 the end

Markers are ordinary ids to the model, so any of them can turn up anywhere. Whatever comes, nothing raises, and `.text`
holds neither a marker nor a thought's header. What is decided about replies out of order:

- A thought or call that is cut off is still a thought or a call, never text.
- A tool call inside a thought is a call, and the thought goes on after it. A thought inside a call ends the call.
- Any channel is a thought, whatever its name; only the name `thought` is taken off.
- What stands between `<|tool_response>` and `<tool_response|>` is not the reply's, nor what follows `<turn|>`.
- A call that cannot be read stays in `.parts` as it was written and gives no ToolCall.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Literal

from ..events import Part, PartKind, Reply, ToolCall, join_text
from .tools import QUOTE, number_calls, parse_tool_calls

if TYPE_CHECKING:
    from .tokenizer import Detokenizer

HEADER = "thought\n"
END_OF_REPLY = ("<turn|>", "<eos>")
# Tokenizers built from a SentencePiece model can have these as pieces that are not called special.
MARKERS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", QUOTE),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)

_State = Literal["text", "thinking", "tool_call", "turn header", "tool answer"]


class ReplyParser:
    """Reads one reply as it is written. The pieces it returns do not depend on how the tokens were divided.

    detokenizer: a fresh one.
    special: special token ids and their names; every other id is text.
    in_thought: the prompt left a thought open, and the reply goes on with it.
    """

    def __init__(self, detokenizer: Detokenizer, special: dict[int, str], *, in_thought: bool = False) -> None:
        self._detokenizer = detokenizer
        self._special = special
        self._text = _SpelledMarkers(special.values())
        self._thoughts = _Thoughts(special.values())
        self._state: _State = "thinking" if in_thought else "text"
        self._after_call: Literal["text", "thinking"] = "text"
        self._call = ""
        self._ended = False
        self._parts: list[Part] = []

    def feed(self, tokens: Iterable[int]) -> list[Part]:
        """Read the next tokens; return what became certain with them. A call is certain when it is complete."""
        for token in tokens:
            if self._ended:
                break
            name = self._special.get(token)
            if name is None:
                self._detokenizer.add_token(token)
            else:
                self._mark(name)
        self._read(self._detokenizer.last_segment)
        return self._take()

    def preview(self, tokens: Sequence[int]) -> list[list[Part]]:
        """Tell what each of `tokens` would add to a reply that ended after the last of them, which adds what was held
        back too; a single item where there are none. The parser stays as it is.
        """
        twin = copy(self)
        twin._detokenizer, twin._parts = _forked(self._detokenizer), self._parts[:]
        twin._text, twin._thoughts = copy(self._text), self._thoughts.fork()
        parts = [twin.feed([token]) for token in tokens] or [[]]
        parts[-1] += twin.finish()
        return parts

    def finish(self) -> list[Part]:
        """End the reply: return what was held back. The parser is then spent."""
        self._enter("text")
        self._add("text", self._text.flush())
        self._ended = True
        return self._take()

    def _mark(self, name: str) -> None:
        """Act on a marker token; those without a meaning here are dropped."""
        if name == "<|channel>":
            self._enter("thinking")
        elif name == "<channel|>" and self._state == "thinking":
            self._enter("text")
        elif name == "<|tool_call>":
            after = self._after_call if self._state == "tool_call" else self._state
            self._enter("tool_call")
            self._after_call = "thinking" if after == "thinking" else "text"
        elif name == "<tool_call|>" and self._state == "tool_call":
            self._enter(self._after_call)
        elif name == QUOTE and self._state == "tool_call":
            self._flush()
            self._call += QUOTE
        elif name == "<|tool_response>":
            self._enter("tool answer")
        elif name == "<tool_response|>" and self._state == "tool answer":
            self._enter("text")
        elif name == "<|turn>":
            self._enter("turn header")
        elif name in END_OF_REPLY:
            self._enter("text")
            self._ended = True

    def _enter(self, state: _State) -> None:
        """End what was being read and begin something else."""
        self._flush()
        if self._state == "thinking":
            self._add("thinking", self._thoughts.end())
        elif self._state == "tool_call":
            self._add("tool_call", self._call.strip())
            self._call = ""
        self._state = state

    def _flush(self) -> None:
        """Read all that the detokenizer has; the bytes of a character that will not be completed are dropped."""
        self._read(self._detokenizer.last_segment)
        self._detokenizer.finalize()
        self._read(self._detokenizer.last_segment.rstrip("\ufffd"))
        self._detokenizer.reset()

    def _read(self, text: str) -> None:
        if self._state == "turn header":
            _, newline, text = text.partition("\n")
            if not newline:
                return
            self._state = "text"
        if self._state == "text":
            self._add("text", self._text.feed(text))
        elif self._state == "thinking":
            self._add("thinking", self._thoughts.feed(text))
        elif self._state == "tool_call":
            self._call += text

    def _add(self, kind: PartKind, text: str) -> None:
        if text:
            self._parts.append((kind, text))

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return merge(parts)


def _forked(detokenizer: Detokenizer) -> Detokenizer:
    """Copy a detokenizer to go its own way. Its state is what `reset` makes anew; all else is the tokenizer's."""
    fork = copy(detokenizer)
    fork.reset()
    for name, value in vars(detokenizer).items():
        if vars(fork)[name] is not value:
            setattr(fork, name, copy(value))
    return fork


def merge(parts: Sequence[Part]) -> list[Part]:
    """Join neighbouring parts of text, and of thinking, into one."""
    merged: list[Part] = []
    for kind, text in parts:
        if merged and merged[-1][0] == kind != "tool_call":
            merged[-1] = (kind, merged[-1][1] + text)
        else:
            merged.append((kind, text))
    return merged


def reply_from_parts(parts: Sequence[Part], first_call: int = 1) -> Reply:
    """Put a finished reply together from all `parts` that `feed` and `finish` gave. first_call: see `calls_in`."""
    return Reply(
        text=join_text(list(parts)),
        thinking="".join(text for kind, text in parts if kind == "thinking"),
        tool_calls=calls_in(parts, first_call),
        parts=merge(parts),
    )


def calls_in(parts: Iterable[Part], first_call: int) -> list[ToolCall]:
    """Read the tool calls among `parts`, those that can be read, and give them ids that count from `first_call` on."""
    written = (text for kind, text in parts if kind == "tool_call")
    return number_calls((call for text in written for call in parse_tool_calls(text)), first_call)


class _SpelledMarkers:
    """Takes the bars out of markers spelled with ordinary tokens: `<|turn>` becomes `<turn>`.

    A reply goes back into the next prompt as text, where a spelled marker would become the real one: a way for
    whatever the model was asked to repeat to open a turn of its own.
    """

    def __init__(self, names: Iterable[str]) -> None:
        markers = [name for name in names if "|" in name]
        self._markers = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        self._beginnings = {marker[:n] for marker in markers for n in range(1, len(marker))}
        self._longest = max(map(len, self._beginnings), default=0)
        self._held = ""

    def feed(self, text: str) -> str:
        """Return `text` without markers, less a tail that could become one, which waits for the next call."""
        text = self._markers.sub(lambda match: match[0].replace("|", ""), self._held + text)
        tails = (text[-n:] for n in range(min(self._longest, len(text)), 0, -1))
        self._held = next((tail for tail in tails if tail in self._beginnings), "")
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _Thoughts:
    """Takes headers, and the white space around them, out of thoughts, and puts a line between one and the next."""

    def __init__(self, names: Iterable[str]) -> None:
        self._spelled = _SpelledMarkers(names)
        self._held = ""
        self._in_header = True
        self._separator = ""
        self._begun = False

    def fork(self) -> _Thoughts:
        twin = copy(self)
        twin._spelled = copy(self._spelled)
        return twin

    def feed(self, text: str) -> str:
        return self._accept(self._spelled.feed(text))

    def end(self) -> str:
        """End the thought. Half a header, all there is of a thought that was cut short, is dropped."""
        last = self._accept(self._spelled.flush())
        if self._begun:
            self._separator = "\n"
        self._held, self._in_header, self._begun = "", True, False
        return last

    def _accept(self, text: str) -> str:
        """Take `text` in; return what is certain now: not yet a header's beginning or white space at the end."""
        self._held += text
        if self._in_header:
            self._held = self._held.lstrip()
            if HEADER.startswith(self._held) and self._held != HEADER:
                return ""
            self._held = self._held.removeprefix(HEADER)
            self._in_header = False
        if not self._begun:
            self._held = self._held.lstrip()
        certain = self._held.rstrip()
        self._held = self._held[len(certain) :]
        if not certain:
            return ""
        separator, self._separator = self._separator, ""
        self._begun = True
        return separator + certain
