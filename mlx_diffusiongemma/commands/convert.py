"""mlx-dg convert"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .common import OFFICIAL


def convert(
    source: Annotated[str | None, typer.Argument(help=f"A directory or Hugging Face repository [{OFFICIAL}].")] = None,
    out: Annotated[Path | None, typer.Argument(help="A new directory [./NAME-4bit].")] = None,
    q4: Annotated[bool, typer.Option("--q4", help="4-bit experts: 16.5 GB.")] = False,
    q8: Annotated[bool, typer.Option("--q8", help="8 bits.")] = False,
    bits: Annotated[int | None, typer.Option("--bits", "--q-bits", help="2, 3, 4, 5, 6 or 8 bits.")] = None,
    quantize: Annotated[
        bool, typer.Option("-q", "--quantize", help="mlx-lm's spelling; quantizing is the default.")
    ] = False,
    dequantize: Annotated[bool, typer.Option("-d", "--dequantize", help="Quantize nothing.")] = False,
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
    from ..convert import convert_checkpoint, plan_conversion

    chosen = [4] * q4 + [8] * q8 + [bits] * (bits is not None)
    if len(chosen) > 1:
        raise typer.BadParameter("give one of --q4, --q8 and --bits")
    if dequantize and (chosen or quantize):
        raise typer.BadParameter("--dequantize leaves no bits to choose")
    width = None if dequantize else chosen[0] if chosen else "auto"
    source = source or hf_path or OFFICIAL
    settings = {"bits": width, "group_size": group_size, "mode": mode, "dtype": dtype, "revision": revision}
    if dry_run:
        typer.echo(plan_conversion(source, **settings).render())
        return
    name = Path(source).resolve().name if Path(source).exists() else source.split("/")[-1]
    out = out or mlx_path or Path(f"{name}-{_width_name(width, mode)}")
    with _progress("converting") as progress:
        report = convert_checkpoint(source, out, **settings, allow_nan=allow_nan, progress=progress)
    typer.echo(report.render(), err=True)
    typer.echo(out)


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
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, at="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, at=name)
