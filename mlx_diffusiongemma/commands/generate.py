"""The verb `mlx-dg generate`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PromptError
from .chatting.decoding import (
    Decoding,
    Grammar,
    MinP,
    RepetitionPenalty,
    Schema,
    Temp,
    TopK,
    TopP,
    asked_form,
    make_options,
)
from .chatting.tools import load_functions
from .common import (
    AdapterPath,
    AsJson,
    CanvasLength,
    Confidence,
    Continue,
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
    Thinking,
    Tools,
    Yes,
    end_line,
    load_model,
    named_model,
    notice,
    say,
    say_cost,
)
from .keeping.conversations import Keeper, find, read
from .keeping.shown import shortened

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..events import Event


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - or nothing reads it from stdin.")
    ] = None,
    model: Model = None,
    adapter: AdapterPath = None,
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
    go_on: Continue = False,
    system: System = None,
    thinking: Thinking = False,
    raw: Annotated[
        bool, typer.Option("--raw", "--ignore-chat-template", help="Continue the prompt without a chat template.")
    ] = False,
    tools: Tools = None,
    max_tokens: MaxTokens = 1024,
    decoder: Decoding = "diffusion",
    mode: Mode = "reference",
    steps: Steps = None,
    entropy_bound: EntropyBound = None,
    confidence: Confidence = None,
    canvas_length: CanvasLength = None,
    temp: Temp = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    schema: Schema = None,
    grammar: Grammar = None,
    stop: Stop = None,
    seed: Seed = None,
    live: LiveCanvas = None,
    heat: Heat = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Record every step in this file (see replay).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --trace replace a file that is no trace.")] = False,
    as_json: AsJson = False,
    yes: Yes = False,
) -> None:
    """Answer a prompt."""
    from .. import ChatSession, stream
    from ..display.terminal import show
    from ..display.trace import TraceWriter, event_json
    from .chatting.turns import Turns

    if raw and (image or video or system or thinking or tools or go_on):
        raise typer.BadParameter("--raw has no chat for --image, --video, --system, --thinking, --tools or --continue.")
    if prompt is not None and prompt_option is not None:
        raise typer.BadParameter("give the prompt once, as PROMPT or with --prompt.")
    text = _prompt_text(prompt if prompt is not None else prompt_option)
    images, videos = image or [], video or []
    if not text.strip() and not images and not videos:
        raise PromptError("The prompt is empty; give a text, as PROMPT or on stdin.")
    options = make_options(
        max_tokens=max_tokens,
        decoder=decoder,
        mode=mode,
        steps=steps,
        entropy_bound=entropy_bound,
        confidence=confidence,
        canvas_length=canvas_length,
        stop=stop,
        seed=seed,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    if force and not trace:
        raise typer.BadParameter("--force is about the file of --trace, which is not given.")
    form = asked_form(schema, grammar)
    functions = load_functions(tools) if tools else {}
    last = read(find("")) if go_on else None
    with ExitStack() as stack:
        # Before the model is loaded, so that nothing is computed for a file that cannot be.
        writer = stack.enter_context(TraceWriter(trace, text, force=force)) if trace else None
        source = named_model(last.model if last and model is None else model)
        loaded, processor = load_model(source, yes=yes, adapter=adapter)
        session = ChatSession(loaded, processor, system, list(functions.values()), thinking, options)
        keeper = Keeper(session, source, notice)
        if last:
            keeper.resume(last)
            say(f"Going on with {last.name}: {shortened(last.title)}")
        if functions and not (trace or as_json):  # whoever reads events runs the tools
            turns = Turns(session, functions, live, heat)
            if turns.take(lambda cancel: session.send(text, images, videos, **form, cancel=cancel)):
                keeper.keep([*images, *videos])
            return
        events: Iterable[Event] = (
            stream(loaded, processor, processor.raw_prompt(text), options=options, **form)
            if raw
            else session.send(text, images, videos, **form)
        )
        if writer:
            events = writer.watch(events)
        if as_json:
            for event in events:
                typer.echo(event_json(event))
        else:
            done = show(events, live=live, heat=heat, options=options.filled_from(loaded.options))
    if not as_json:
        end_line()
        say_cost(done)
        if done.note:
            notice(done.note)
    if not raw:
        keeper.keep([*images, *videos])


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
