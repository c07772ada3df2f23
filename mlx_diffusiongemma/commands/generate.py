"""The verb `mlx-dg generate`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PromptError
from .chatting.tools import Functions, load_functions
from .common import (
    CanvasLength,
    Confidence,
    EntropyBound,
    Heat,
    LiveCanvas,
    MaxTokens,
    Mode,
    Model,
    Seed,
    Steps,
    Stop,
    System,
    Temp,
    Temperature,
    Thinking,
    Tools,
    TopK,
    TopP,
    chosen_mode,
    end_line,
    load_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..events import Event
    from ..processing.processor import Processor, Prompt


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - or nothing reads it from stdin.")
    ] = None,
    model: Model = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="PROMPT", help="mlx-lm's spelling of PROMPT.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="FILE", help="An image; may be given several times.")
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option("--video", metavar="FILE", help="A GIF, WebP or APNG; may be given several times."),
    ] = None,
    system: System = None,
    thinking: Thinking = False,
    raw: Annotated[
        bool, typer.Option("--raw", "--ignore-chat-template", help="Continue the prompt without a chat template.")
    ] = False,
    tools: Tools = None,
    max_tokens: MaxTokens = 1024,
    mode: Mode = "reference",
    steps: Steps = None,
    entropy_bound: EntropyBound = None,
    confidence: Confidence = None,
    canvas_length: CanvasLength = None,
    stop: Stop = None,
    seed: Seed = None,
    live: LiveCanvas = None,
    heat: Heat = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Record every step in this file (see replay).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --trace replace a file that is no trace.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON event a line.")] = False,
    temp: Temp = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
) -> None:
    """Answer a prompt."""
    from .. import ChatSession, GenerationOptions, stream
    from ..display.terminal import show, statistics_line
    from ..display.trace import TraceWriter, event_json
    from .chatting.turns import Turns

    if raw and (image or video or system or thinking or tools):
        raise typer.BadParameter("--raw has no chat for --image, --video, --system, --thinking or --tools.")
    if prompt is not None and prompt_option is not None:
        raise typer.BadParameter("give the prompt once, as PROMPT or with --prompt.")
    text = _prompt_text(prompt if prompt is not None else prompt_option)
    images, videos = image or [], video or []
    if not text.strip() and not images and not videos:
        raise PromptError("The prompt is empty; give a text, as PROMPT or on stdin.")
    options = GenerationOptions(
        max_tokens=max_tokens,
        max_steps=steps,
        entropy_bound=entropy_bound,
        confidence=confidence,
        canvas_length=canvas_length,
        stop=tuple(stop or ()),
        seed=seed,
    ).filled_from(chosen_mode(mode))
    if force and not trace:
        raise typer.BadParameter("--force is about the file of --trace, which is not given.")
    functions = load_functions(tools) if tools else {}
    with ExitStack() as stack:
        writer = stack.enter_context(TraceWriter(trace, force=force)) if trace else None  # before the model is loaded
        loaded, processor = load_model(model)
        if functions and not (trace or as_json):  # whoever reads events runs the tools
            session = ChatSession(loaded, processor, system, list(functions.values()), thinking, options)
            Turns(session, functions, live, heat).take(lambda cancel: session.send(text, images, videos, cancel=cancel))
            return
        request = _request(processor, text, raw, system, images, videos, thinking, functions)
        events: Iterable[Event] = stream(loaded, processor, request, options=options)
        if writer:
            events = writer.watch(events)
        if as_json:
            for event in events:
                typer.echo(event_json(event))
            return
        done = show(events, live=live, heat=heat, options=options.filled_from(loaded.options))
    end_line()
    typer.echo(statistics_line(done.stats), err=True)
    if done.note:
        typer.echo(f"mlx-dg: {done.note}", err=True)


def _request(
    processor: Processor,
    text: str,
    raw: bool,
    system: str | None,
    images: list[str],
    videos: list[str],
    thinking: bool,
    functions: Functions,
) -> Prompt:
    if raw:
        return processor.raw_prompt(text)
    messages = [{"role": "user", "content": processor.content(text, images, videos)}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return processor.prompt(messages, tools=list(functions.values()), thinking=thinking)


def _prompt_text(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or - to read it from stdin.", param_hint="'PROMPT'")
    text = sys.stdin.buffer.read()
    try:
        return text.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError:
        raise PromptError("The prompt on stdin is not UTF-8 text; convert it first.") from None
