"""The verb `mlx-dg convert`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..convert import RECIPES
from ..paths import user_path
from .common import OFFICIAL, Yes, announce_download, notice, one_of, say

BUILT_IN = "default"  # calibration prompts
EPILOG = "Recipes, with their size for the published model: " + "\n\n".join(
    [
        "",
        *(
            f"{name}: {recipe.summary}; {recipe.total_bytes / 1e9:.1f} GB, {recipe.macs}"
            for name, recipe in RECIPES.items()
        ),
    ]
)


def convert(
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help=f"A directory or Hugging Face repository [{OFFICIAL}].")
    ] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="A new directory [./NAME-4bit].")] = None,
    q4: Annotated[bool, typer.Option("--q4", help="4 bits.")] = False,
    q8: Annotated[bool, typer.Option("--q8", help="8 bits.")] = False,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits", "--q-bits", metavar="N", parser=one_of(2, 3, 4, 5, 6, 8), help="2, 3, 4, 5, 6 or 8 bits."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "--q-group-size",
            metavar="N",
            parser=one_of(16, 32, 64, 128),
            help="Weights per scale: 32, 64 or 128; 16 with nvfp4.",
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", "--q-mode", metavar="MODE", help="affine, mxfp4, mxfp8 or nvfp4.")
    ] = "affine",
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME", help="What gets how many bits; see below.")
    ] = "community",
    set_bits: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATTERN=BITS", help="Bits, a mode or none for some modules: 'layers.0.*=8'."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help="bfloat16, float16 or float32, for what is not quantized."),
    ] = None,
    dequantize: Annotated[bool, typer.Option("-d", "--dequantize", help="Quantize nothing.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="A branch, tag or commit of the repository.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Download, convert and delete one file of the repository at a time.")
    ] = False,
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Convert weights that hold NaN or infinity.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar=f"FILE|{BUILT_IN}",
            help="Compare with the unquantized model on a file of prompts, one per line, or the built-in ones.",
        ),
    ] = None,
    upload: Annotated[
        str | None, typer.Option("--upload", "--upload-repo", metavar="REPO", help="Then upload it here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Upload into a repository that has files.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what a stopped conversion to OUT has finished.")
    ] = False,
    yes: Yes = False,
    hf_path: Annotated[
        str | None, typer.Option("--hf-path", metavar="SOURCE", help="mlx-lm's spelling of SOURCE.")
    ] = None,
    mlx_path: Annotated[
        Path | None, typer.Option("--mlx-path", metavar="OUT", help="mlx-lm's spelling of OUT.")
    ] = None,
    quantize: Annotated[bool, typer.Option("-q", "--quantize", help="mlx-lm's spelling of the default.")] = False,
) -> None:
    """Turn a published checkpoint into quantized MLX arrays, in little memory."""
    from ..checkpoints.hub import is_repository
    from ..checkpoints.remembered import remember
    from ..convert import calibrate as measure
    from ..convert import (
        check_calibration,
        check_conversion,
        check_upload,
        convert_checkpoint,
        plan_conversion,
        upload_checkpoint,
    )
    from ..convert.reading.remote import WHOLE

    width = _chosen_bits(q4, q8, bits, dequantize, quantize)
    if (source and hf_path) or (out and mlx_path):
        raise typer.BadParameter("give SOURCE and OUT once, by position or as --hf-path and --mlx-path")
    source = source or hf_path or OFFICIAL
    if not is_repository(source) and (stream or revision):
        what = "--stream" if stream else "--revision"
        raise typer.BadParameter(f"{what} is about a repository, and {source} is a directory; leave it out")
    if dequantize and not set_bits and (group_size or mode != "affine" or recipe != "community"):
        raise typer.BadParameter("--dequantize leaves nothing for --group-size, --mode and --recipe to say")
    if force and not upload:
        raise typer.BadParameter("--force is about the repository of --upload, which is not given")
    settings: dict[str, Any] = {
        "bits": width,
        "group_size": group_size,
        "mode": mode,
        "recipe": recipe,
        "overrides": _overrides(set_bits or []),
        "dtype": dtype,
        "revision": revision,
    }
    name = Path(source).resolve().name if Path(source).exists() else source.split("/")[-1]
    out = out or mlx_path or Path(f"{name}-{_suffix(width, mode, recipe)}")
    # All that can be known goes before the hours that a download and a conversion may take.
    prompts = _prompts(calibrate)
    if upload:
        check_upload(upload, force=force)
    if dry_run:
        typer.echo(plan_conversion(source, **settings).render())
    further = check_calibration(source, prompts, revision=revision) if prompts else 0
    how: dict[str, Any] = {"allow_nan": allow_nan, "stream": stream, "restart": restart}
    plan = check_conversion(source, out, **settings, **how, further_bytes=further)
    if dry_run:
        return
    beside = {out.absolute().parent: plan.file_bytes + further}
    announce_download(source, revision, WHOLE, yes=yes, beside=beside, kept=not stream)
    with _kept(out), _progress("converting") as progress:
        report = convert_checkpoint(source, out, **settings, **how, progress=progress, tell=say)
    remember(out, notice)
    say(report.render())
    if prompts:
        count = f"{len(prompts)} prompt{'s' * (len(prompts) != 1)}"
        say(f"Comparing answers to {count} with the unquantized model's, which takes as long as all of them…")
        say(measure(out, source, prompts, revision=revision, stream=stream).render())
    if upload:
        say(upload_checkpoint(out, upload, force=force))
    typer.echo(out)
    say(f'Next: mlx-dg generate --model {shlex.quote(str(out))} "Why is the sky blue?"')


def _chosen_bits(q4: bool, q8: bool, bits: int | None, dequantize: bool, quantize: bool) -> int | str | None:
    """The width asked for: "auto" where none is, None for no quantization."""
    chosen = [4] * q4 + [8] * q8 + [bits] * (bits is not None)
    if len(chosen) > 1:
        raise typer.BadParameter("give one of --q4, --q8 and --bits")
    if dequantize and (chosen or quantize):
        raise typer.BadParameter("--dequantize leaves no bits to choose")
    return None if dequantize else chosen[0] if chosen else "auto"


def _overrides(settings: list[str]) -> dict[str, str]:
    pairs = [setting.partition("=") for setting in settings]
    if not all(pattern and bits for pattern, _, bits in pairs):
        raise typer.BadParameter("--set takes PATTERN=BITS, such as 'layers.0.*=8'")
    return {pattern: bits for pattern, _, bits in pairs}


def _suffix(bits: int | str | None, mode: str, recipe: str) -> str:
    """The end of a converted directory's name."""
    if bits is None:
        return "mlx"
    if mode != "affine":
        return mode
    if bits == "auto":
        bits = RECIPES[recipe].bits if recipe in RECIPES else 4
    return f"{bits}bit"


def _prompts(calibrate: str | None) -> Sequence[str]:
    """What to calibrate with; nothing where it was not asked for."""
    from ..convert import read_prompts
    from ..convert.calibration import PROMPTS

    if calibrate is None:
        return ()
    return PROMPTS if calibrate == BUILT_IN else read_prompts(calibrate)


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Say what an interruption leaves to go on from."""
    from ..checkpoints.hub import Interrupted
    from ..convert.writing.partial import amount, finished_bytes, partial_path

    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        done = finished_bytes(user_path(out))
        if done:
            say(f"{amount(done)} are finished in {partial_path(out)}; the same command goes on from there.")
        raise


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Draw a line of progress on stderr, for bytes done, bytes in all and the tensor at hand.

    The numbers come first and keep their width; the bar and the tensor's name share what the terminal has beside them.
    """
    from rich.console import Console, RenderableType
    from rich.constrain import Constrain
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True)

    class Line(Progress):
        def get_renderable(self) -> RenderableType:
            """Leave room for the ^C that a terminal writes after the line: wrapped, it would leave the line there."""
            return Constrain(super().get_renderable(), console.width - len("^C") - 1)

    columns = (
        TextColumn(what, table_column=Column(no_wrap=True)),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        BarColumn(None, table_column=Column(ratio=1)),
        TextColumn("[dim]{task.fields[at]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3)),
    )
    with Line(*columns, console=console, transient=True, disable=not console.is_terminal, expand=True) as bar:
        task = bar.add_task(what, total=None, at="")
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, at=name.removeprefix("model.").removeprefix("decoder.")
        )
