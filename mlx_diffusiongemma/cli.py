"""The `mlx-dg` command. Answers go to stdout; drafts, progress and statistics to stderr.

Everything heavy is imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from .errors import DiffusionGemmaError, PromptError

if TYPE_CHECKING:
    from .model.diffusion_gemma import DiffusionGemma
    from .processor import Processor

OFFICIAL = "google/diffusiongemma-26B-A4B-it"
DEMO_TASKS = ("sort 53142", "reverse canvas", "json name=ada age=36", "solve 42.3/3.24/1.../2.31", "count from 17")
READY_MADE = "mlx-community/diffusiongemma-26B-A4B-it-4bit"


class _Verbs(TyperGroup):
    """Turns what a user can do something about into one sentence and an exit code."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except DiffusionGemmaError as error:
            typer.echo(f"mlx-dg: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("mlx-dg: interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read the answer has seen enough; the interpreter must not complain about it either.
            sys.stdout = None
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="DiffusionGemma on Apple silicon, in pure MLX.",
)


def main() -> None:
    app()


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


Model = Annotated[
    str | None,
    typer.Option("--model", metavar="PATH|REPO", help="A converted checkpoint; else the one last converted here."),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Most denoising steps per canvas [the checkpoint's].")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", help="Most tokens to generate.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes a reply repeatable.")]
LiveCanvas = Annotated[bool | None, typer.Option("--canvas/--no-canvas", help="Draw the canvas while it denoises.")]


@app.command()
def convert(
    source: Annotated[str | None, typer.Argument(help=f"A directory or Hugging Face repository [{OFFICIAL}].")] = None,
    out: Annotated[Path | None, typer.Argument(help="A new directory [./NAME-4bit].")] = None,
    q4: Annotated[bool, typer.Option("--q4", help="4-bit experts: 16.5 GB.")] = False,
    q8: Annotated[bool, typer.Option("--q8", help="8 bits.")] = False,
    bits: Annotated[int | None, typer.Option("--bits", "--q-bits", help="2, 3, 4, 5, 6 or 8 bits.")] = None,
    quantize: Annotated[
        bool, typer.Option("-q", "--quantize", help="Quantize; with no other choice to 4 bits.")
    ] = False,
    group_size: Annotated[
        int | None, typer.Option("--group-size", "--q-group-size", help="Weights per scale: 32, 64 or 128.")
    ] = None,
    mode: Annotated[str, typer.Option("--mode", "--q-mode", help="affine, mxfp4, mxfp8 or nvfp4.")] = "affine",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16, float16 or float32, for what is not quantized.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of the repository.")] = None,
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Convert weights that hold NaN or infinity.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    hf_path: Annotated[str | None, typer.Option("--hf-path", help="mlx-lm's spelling of SOURCE.")] = None,
    mlx_path: Annotated[Path | None, typer.Option("--mlx-path", help="mlx-lm's spelling of OUT.")] = None,
) -> None:
    """Turn a published checkpoint into quantized MLX arrays, in little memory."""
    from .convert import convert_checkpoint, plan_conversion

    chosen = [4] * q4 + [8] * q8 + [bits] * (bits is not None)
    if len(chosen) > 1:
        raise typer.BadParameter("give one of --q4, --q8 and --bits")
    if dequantize and (chosen or quantize):
        raise typer.BadParameter("--dequantize leaves no bits to choose")
    width = None if dequantize else chosen[0] if chosen else "auto"
    source = source or hf_path or OFFICIAL
    settings = {"bits": width, "group_size": group_size, "mode": mode, "dtype": dtype, "revision": revision}
    if dry_run:
        typer.echo(plan_conversion(source, **settings).to_text())
        return
    suffix = f"{width}bit" if width else "mlx"
    out = (
        out
        or mlx_path
        or Path(f"{Path(source).resolve().name if Path(source).exists() else source.split('/')[-1]}-{suffix}")
    )
    with _progress("converting") as progress:
        report = convert_checkpoint(source, out, **settings, allow_nan=allow_nan, progress=progress)
    typer.echo(report.to_text(), err=True)
    typer.echo(out)


@app.command()
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
    from . import GenerationOptions, stream
    from .terminal import show, statistics_line
    from .trace import event_json

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
    loaded, processor = _load(model)
    if raw:
        request = processor.raw_prompt(text)
    else:
        request = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
        request = processor.prompt(request, images=image or (), thinking=thinking)
    events = stream(loaded, processor, request, options=options)
    if as_json:
        for event in events:
            typer.echo(event_json(event))
        return
    done = show(events, live=live, decode=processor.draft_text)
    _end_line()
    typer.echo(statistics_line(done.stats), err=True)


@app.command()
def demo(seed: Seed = 0, live: LiveCanvas = None) -> None:
    """Convert and run the small trained checkpoint that comes with this package; nothing is downloaded."""
    from . import load, stream
    from .terminal import show, statistics_line

    directory = _demo_checkpoint()
    model, processor = load(directory)
    for task in (
        "sort 53142",
        "reverse diffusion",
        "solve 1.3./..12/2.4./...1",
        "json name=ada age=36",
        "count from 17",
    ):
        typer.secho(f"> {task}", err=True, bold=True)
        done = show(stream(model, processor, task, seed=seed), live=live, decode=processor.draft_text)
        _end_line()
        typer.secho(statistics_line(done.stats), err=True, dim=True)


def _width_name(bits: int | str | None, mode: str) -> str:
    """How a converted directory's name ends."""
    if bits is None:
        return "mlx"
    if mode != "affine":
        return mode
    return "4bit" if bits == "auto" else f"{bits}bit"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr for bytes done, bytes in all and the tensor at hand."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[at]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, at="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, at=name)


def _demo_checkpoint() -> Path:
    """The demo checkpoint at 4 bits, converted into the user's cache directory on first use."""
    import platform

    from . import __version__
    from .convert import convert_checkpoint

    caches = Path.home() / ("Library/Caches" if platform.system() == "Darwin" else ".cache")
    out = caches / "mlx-diffusiongemma" / f"demo-4bit-{__version__}"
    if not out.exists():
        typer.echo(f"Converting the demo checkpoint to 4 bits in {out}", err=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        convert_checkpoint(Path(__file__).parent / "demo", out, bits=4)
    return out


def _end_line() -> None:
    """A piped answer ends with a line break too; a terminal's has one already."""
    if not sys.stdout.isatty():
        typer.echo()


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


def _load(name: str | None) -> tuple[DiffusionGemma, Processor]:
    from . import load

    return load(name or _default_model())


def _default_model() -> str:
    """What was last converted in this directory, else the ready-made checkpoint, whose download size is said first."""
    from .config import MODEL_TYPE, read_json

    converted = []
    for config in Path().glob("*/config.json"):
        found = read_json(config)
        if found.get("model_type") == MODEL_TYPE and "quantization" in found:
            converted.append(config)
    if converted:
        newest = max(converted, key=lambda path: path.stat().st_mtime).parent
        typer.echo(f"Using {newest}", err=True)
        return str(newest)
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(READY_MADE, "config.json"), str):
        typer.echo(f"Downloading {READY_MADE}, 16.5 GB; later runs use the downloaded files.", err=True)
    return READY_MADE
