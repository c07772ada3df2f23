"""The verb `mlx-dg generate`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PromptError
from .common import LiveCanvas, MaxTokens, Model, Seed, Steps, end_line, load_model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..events import Event
    from ..processing.processor import Processor, Prompt


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.")] = None,
    model: Model = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", help="mlx-lm's spelling of PROMPT.")] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="An image file; may be given several times.")
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", help="A GIF, WebP or APNG file; may be given several times.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "--system-prompt", help="A system message.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", "--ignore-chat-template", help="Continue the prompt without a chat template.")
    ] = False,
    max_tokens: MaxTokens = 1024,
    mode: Annotated[str, typer.Option("--mode", help="reference or fast; other options win over it.")] = "reference",
    steps: Steps = None,
    entropy_bound: Annotated[
        float | None, typer.Option("--entropy-bound", help="Nats accepted per step [the checkpoint's].")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option("--confidence", help="Mean entropy that ends a canvas, nats [the checkpoint's].")
    ] = None,
    canvas_length: Annotated[
        int | None, typer.Option("--canvas-length", help="Tokens per canvas [the checkpoint's].")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the reply; may be repeated.")] = None,
    seed: Seed = None,
    live: LiveCanvas = None,
    heat: Annotated[bool, typer.Option("--heat", help="Colour drafted tokens by their entropy.")] = False,
    trace: Annotated[Path | None, typer.Option("--trace", help="Record every step in this file (see replay).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --trace replace a file that is no trace.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON event a line.")] = False,
    temp: Annotated[float | None, typer.Option("--temp", hidden=True)] = None,
) -> None:
    """Answer a prompt."""
    from .. import MODES, GenerationOptions, stream
    from ..display.terminal import show, statistics_line
    from ..display.trace import TraceWriter, event_json

    if temp is not None:
        raise PromptError(
            "A denoising step's temperature follows the checkpoint's schedule (0.8 falling to 0.4), so --temp has no "
            "meaning here; leave it out, or change how much is accepted per step with --entropy-bound."
        )
    if raw and (image or video or system or thinking):
        raise typer.BadParameter("--raw has no chat for --image, --video, --system or --thinking")
    if prompt is not None and prompt_option is not None:
        raise typer.BadParameter("give the prompt once, as PROMPT or with --prompt")
    text = _prompt_text(prompt if prompt is not None else prompt_option)
    if mode not in MODES:
        raise typer.BadParameter(f"{mode!r} is none of {', '.join(MODES)}", param_hint="--mode")
    options = GenerationOptions(
        max_tokens=max_tokens,
        max_steps=steps,
        entropy_bound=entropy_bound,
        confidence=confidence,
        canvas_length=canvas_length,
        stop=tuple(stop or ()),
        seed=seed,
    ).filled_from(MODES[mode])
    if force and not trace:
        raise typer.BadParameter("--force is about the file of --trace, which is not given")
    with ExitStack() as stack:
        writer = stack.enter_context(TraceWriter(trace, force=force)) if trace else None  # before the model is loaded
        loaded, processor = load_model(model)
        request = _request(processor, text, raw, system, image or [], video or [], thinking)
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
) -> Prompt:
    if raw:
        return processor.raw_prompt(text)
    messages = [{"role": "user", "content": processor.content(text, images, videos)}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return processor.prompt(messages, thinking=thinking)


def _prompt_text(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or - to read it from stdin", param_hint="PROMPT")
    text = sys.stdin.buffer.read()
    try:
        return text.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError:
        raise PromptError("The prompt on stdin is not UTF-8 text; convert it first.") from None
