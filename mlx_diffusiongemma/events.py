"""Events that generation reports while it runs: plain Python data, safe to hand to any thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PartKind = Literal["text", "thinking", "tool_call"]
FinishReason = Literal["stop", "length", "tool", "cancelled"]
Part = tuple[PartKind, str]


def join_text(parts: list[Part]) -> str:
    """Join the visible text of `parts`: thoughts and tool calls are left out."""
    return "".join(text for kind, text in parts if kind == "text")


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called, with its arguments by name.

    `id` is unique in the conversation, `call_1`, `call_2` and so on; the tool's answer names it. Two calls are equal
    that call the same with the same arguments.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reply:
    """A finished reply, taken apart. `parts` keeps the order in which the model wrote it."""

    text: str
    thinking: str
    tool_calls: list[ToolCall]
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class Prefill:
    """Progress with the prompt: `done` of its `total` tokens are encoded."""

    done: int
    total: int


@dataclass(frozen=True)
class Draft:
    """One denoising step. `tokens` is the argmax canvas, which is what would be committed now.

    `accepted` marks the positions whose sample goes into the next step's canvas; `entropy` is in nats per position,
    after the step's temperature. `step` counts from 1. `parts` are what the reply would gain, told apart as in
    `Commit`, and `text` is the visible part of it. `pieces` says what each token adds to them, of whatever kind.
    `holes` are the first of `tokens` in each hole of a text and the one after its last, as it looks at this step.
    """

    canvas: int
    step: int
    max_steps: int
    tokens: list[int]
    accepted: list[bool]
    entropy: list[float]
    text: str
    parts: list[Part] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    holes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def mean_entropy(self) -> float:
        return sum(self.entropy) / len(self.entropy)


@dataclass(frozen=True)
class Commit:
    """A finished canvas: its tokens before the first end token, and the text that became certain with it.

    A causal decoder commits what it is certain of: a token, or those of a draft that it keeps. `steps` counts the
    denoising steps behind them. `tool_calls` are the calls among `parts` that can be read; one that cannot is there as
    it was written.
    """

    canvas: int
    tokens: list[int]
    parts: list[Part]
    steps: int
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def text(self) -> str:
        return join_text(self.parts)


@dataclass(frozen=True)
class Stats:
    """The cost of a request. Times are seconds of wall clock, memory is bytes.

    `cached_tokens` of the prompt's were not encoded again; `generated_tokens` counts what was committed; `steps` holds
    the denoising steps of each canvas; `retries` counts the empty first canvases that were denoised again. `passes`
    counts the causal passes behind the reply: one for each canvas that another one follows, for each token that is
    written left to right, or for each draft that is verified.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: list[int] = field(default_factory=list)
    retries: int = 0
    prompt_seconds: float = 0.0
    denoise_seconds: float = 0.0
    peak_memory_bytes: int = 0
    passes: int = 0

    @property
    def prompt_tokens_per_second(self) -> float:
        encoded = self.prompt_tokens - self.cached_tokens
        return encoded / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.denoise_seconds if self.denoise_seconds else 0.0

    @property
    def steps_per_canvas(self) -> float:
        return sum(self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def forwards(self) -> int:
        """Count how often the reply went through the layers: denoising steps and causal passes."""
        return sum(self.steps) + self.passes

    @property
    def tokens_per_pass(self) -> float:
        return self.generated_tokens / self.passes if self.passes else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.generated_tokens / sum(self.steps) if self.steps else 0.0


@dataclass(frozen=True)
class Done:
    """The last event of a request.

    note: a sentence for the user where the reply says nothing, and why. seed: the one that gives this reply again.
    data: the value that the reply gives, where a JSON Schema was asked for and the reply is whole. stop_string: the
    one of the request's that ended it.
    """

    finish_reason: FinishReason
    stats: Stats
    note: str = ""
    seed: int | None = None
    data: Any = None
    stop_string: str | None = None


@dataclass(frozen=True)
class Filled:
    """So many holes of the text's `total` have the tokens that they keep: `done`. Only what fills holes reports it."""

    done: int
    total: int


Event = Prefill | Draft | Filled | Commit | Done


@dataclass(frozen=True)
class Result:
    """A whole reply. `print(result)` prints its text.

    note, seed, data, stop_string: see `Done`. index: in a batch, the place of its prompt.
    """

    text: str
    thinking: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stats: Stats = field(default_factory=Stats)
    note: str = ""
    seed: int | None = None
    index: int = 0
    data: Any = None
    stop_string: str | None = None

    def __str__(self) -> str:
        return self.text
