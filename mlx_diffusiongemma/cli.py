"""The `mlx-dg` command. Answers go to stdout; drafts, progress and statistics to stderr."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .commands.bench import bench
from .commands.chatting.chat import chat
from .commands.check import check
from .commands.convert import EPILOG, convert
from .commands.demo import demo
from .commands.edit import edit
from .commands.generate import generate
from .commands.infill import infill
from .commands.replay import replay
from .errors import DiffusionGemmaError


class _Verbs(TyperGroup):
    """Turns what a user can do something about into one sentence and an exit code."""

    def invoke(self, context: Any) -> Any:
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
        except OSError as error:
            typer.echo(f"mlx-dg: {error}; check the path and its permissions.", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="DiffusionGemma on Apple silicon, in pure MLX.",
)


def main() -> None:
    # Pillow's remarks on odd files; what cannot be read is an error of ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    app()


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


app.command(epilog=EPILOG)(convert)
for verb in (generate, chat, infill, edit, demo, check, replay, bench):
    app.command()(verb)
