"""mlx-dg generate"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import PromptError
from .common import LiveCanvas, MaxTokens, Model, Seed, Steps, end_line, load_model


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.")] = None,
    model: Model = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", help="mlx-lm's spelling of PROMPT.")] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="An image file; may be given several times.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "--system-prompt", help="A system message.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", "--ignore-chat-template", help="Continue the prompt without a chat template.")
    ] = False,
    max_tokens: MaxTokens = 1024,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON event a line.")] = False,
    temp: Annotated[float | None, typer.Option("--temp", hidden=True)] = None,
) -> None:
    """Answer a prompt."""
    from .. import GenerationOptions, stream
    from ..terminal import show, statistics_line
    from ..trace import event_json

    if temp is not None:
        raise PromptError(
            "A denoising step's temperature follows the checkpoint's schedule (0.8 falling to 0.4), so --temp has no "
            "meaning here; leave it out, or change how much is accepted per step with --entropy-bound."
        )
    text = _prompt_text(prompt if prompt is not None else prompt_option)
    options = GenerationOptions(
        max_tokens=max_tokens,
        max_steps=steps,
        entropy_bound=entropy_bound,
        confidence=confidence,
        canvas_length=canvas_length,
        stop=tuple(stop or ()),
        seed=seed,
    )
    loaded, processor = load_model(model)
    if raw:
        request = processor.raw_prompt(text)
    else:
        parts = [*({"type": "image"} for _ in image or ()), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": parts if image else text}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        request = processor.prompt(messages, images=image or (), thinking=thinking)
    events = stream(loaded, processor, request, options=options)
    if as_json:
        for event in events:
            typer.echo(event_json(event))
        return
    done = show(events, live=live, decode=processor.draft_text)
    end_line()
    typer.echo(statistics_line(done.stats), err=True)


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
