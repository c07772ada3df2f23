"""The `mlx-dg` command. Answers go to stdout; drafts, progress and statistics to stderr."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .commands.bench import bench
from .commands.chatting.chat import chat
from .commands.check import check
from .commands.common import Verb, notice
from .commands.convert import EPILOG, convert
from .commands.demo import demo
from .commands.edit import edit
from .commands.generate import generate
from .commands.infill import infill
from .commands.keeping.logs import logs
from .commands.models import models
from .commands.replay import replay
from .commands.serving.serve import serve
from .commands.training.fuse import fuse
from .commands.training.train import train
from .errors import DiffusionGemmaError

EXAMPLES = {
    "convert": """
        mlx-dg convert
        mlx-dg convert --recipe small --dry-run
        mlx-dg convert ./my-finetune ./my-finetune-8bit --q8
        mlx-dg convert --q4 --stream --upload me/diffusiongemma-4bit""",
    "generate": """
        mlx-dg generate "Why is the sky blue?"
        git diff | mlx-dg generate --system "Write a commit message."
        mlx-dg generate "What is this?" --image photo.jpg --decoder ar
        mlx-dg generate "Tell me a story" --trace story.jsonl --heat
        mlx-dg generate -c 'Make it shorter.'""",
    "chat": """
        mlx-dg chat -c
        mlx-dg chat --system "Be brief." --thinking
        mlx-dg chat --tools tools.py --mode fast
        mlx-dg chat < questions.txt > answers.txt""",
    "infill": """
        mlx-dg infill draft.py --hole TODO --tokens 64
        echo "The <FILL> is blue." | mlx-dg infill -
        mlx-dg infill letter.txt --instruction "Be polite." --exact""",
    "edit": """
        mlx-dg edit client.py "make it async" --lines 10:20
        mlx-dg edit notes.md "fix the grammar" --lines 3 --strength 0.4
        mlx-dg edit client.py "add types" --lines 1:30 --write""",
    "demo": """
        mlx-dg demo
        mlx-dg demo --seed 7 --canvas
        mlx-dg demo --json""",
    "check": """
        mlx-dg check diffusiongemma-26B-A4B-it-4bit
        mlx-dg check ./my-finetune-8bit && echo fine""",
    "replay": """
        mlx-dg replay story.jsonl --speed 2 --heat
        mlx-dg replay story.jsonl --svg story.svg
        mlx-dg replay story.jsonl --gif story.gif --entropy entropy.svg""",
    "bench": """
        mlx-dg bench
        mlx-dg bench --plan --context 32768
        mlx-dg bench --steps 4,8 --json > report.json
        mlx-dg bench --against mlx-community/gemma-3-4b-it-4bit""",
    "train": """
        mlx-dg train --data examples --iters 500
        mlx-dg train --data examples -c lora_config.yaml --grad-checkpoint
        mlx-dg train --data examples --generate 50 --patience 5 --test --train
        mlx-dg train --data examples --iters 1000 --resume
        mlx-dg train --data examples --test""",
    "fuse": """
        mlx-dg fuse --adapter adapters ./my-model-4bit
        mlx-dg fuse --adapter adapters --dequantize ./my-model""",
    "serve": """
        mlx-dg serve
        mlx-dg serve --model my-finetune-8bit --port 8012
        mlx-dg serve --host 0.0.0.0 --api-key "$(cat key.txt)" --queue 8""",
    "models": """
        mlx-dg models
        mlx-dg generate "Hello" --model my-finetune-8bit
        mlx-dg models remove my-finetune-8bit
        mlx-dg models remove my-finetune-8bit --keep-files""",
    "logs": """
        mlx-dg logs -n 5
        mlx-dg logs show
        mlx-dg logs show 20261121-2023 --json
        mlx-dg logs remove --all""",
}

# What helps where the system refuses, by its reason.
HINTS = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "write elsewhere",
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file's path",
    errno.ENOTDIR: "check the path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EIO: "check the disk",
    errno.EMFILE: "close other programs and try again",
    errno.ENOMEM: "close other programs and try again",
}


class _Ended(BaseException):
    """The system, or whoever closed the terminal, ends the process: by the signal of this number."""

    def __init__(self, number: int):
        self.number = number


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Let signals that would end the process on the spot raise `_Ended`, so that no unfinished file is left behind."""
    ending = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
    if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
        ending = []

    def end(number: int, frame: object) -> None:
        for other in ending:  # a second one must not interrupt the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    # What is ignored, as `nohup` has it, stays so.
    before = {number: signal.signal(number, end) for number in ending if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _in_sentences() -> Iterator[None]:
    """Turn what a user can do something about into one sentence and an exit code."""
    try:
        yield
    except DiffusionGemmaError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except _Ended as ended:
        sys.stdout = None  # there may be nobody to write to any more
        with suppress(OSError):
            notice(signal.strsignal(ended.number) or "ended")
        raise typer.Exit(128 + ended.number) from None
    except BrokenPipeError:
        # Whoever read the answer has seen enough; the interpreter must not complain about it either.
        sys.stdout = None
        raise typer.Exit(0) from None
    except OSError as error:
        if error.filename is None:  # what cannot be written cannot be written at the exit either
            sys.stdout = None
        _fail(_sentence(error), 1)


class _Verbs(TyperGroup):
    """The verbs, whose errors are printed, not raised."""

    def make_context(self, *given: Any, **named: Any) -> Any:
        """Read the options before the verb, of which some print and exit."""
        with _in_sentences():
            return super().make_context(*given, **named)

    def invoke(self, context: Any) -> Any:
        """Run a verb."""
        with _in_sentences():
            with _ending_cleanly():
                result = super().invoke(context)
            sys.stdout.flush()
            return result


def _fail(sentence: str, code: int) -> None:
    notice(sentence)
    raise typer.Exit(code) from None


def _sentence(error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    what = "The output could not be written" if error.filename is None else f"{error.filename} cannot be used"
    return f"{what} ({reason}); {HINTS.get(error.errno or 0, 'check the path and the disk')}."


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich would read the brackets in help texts as markup, and cut words off in narrow terminals.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="DiffusionGemma on Apple silicon, in pure MLX.",
    epilog="Begin with `mlx-dg demo`, which downloads nothing; `mlx-dg VERB --help` has examples.",
)


def main() -> None:
    """Run the command with what is in `sys.argv`."""
    _open_what_is_closed()
    # Pillow's remarks on odd files; what cannot be read is an error of ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # Transformers' remark that PyTorch is not installed, of which it needs only tokenizers here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    app()


def _open_what_is_closed() -> None:
    """Open standard streams that the process was started without (`<&-`): else other files would get their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _print_version(show: bool) -> None:
    if not show:
        return
    from . import __version__

    typer.echo(f"mlx-dg {__version__}\n{_backend()}")
    raise typer.Exit


def _backend() -> str:
    """MLX's version and the device that it computes on, or why there is none."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        import mlx.core as mx

        device = mx.device_info() if mx.default_device() == mx.gpu else {}
        name = device.get("device_name", "GPU") if mx.default_device() == mx.gpu else "CPU"
        return f"MLX {version_of('mlx')} on {name}"
    except (ImportError, PackageNotFoundError, RuntimeError) as error:
        return f"MLX cannot be used: {str(error).splitlines()[0]}"


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version, MLX's and its device; exit."
        ),
    ] = False,
) -> None:
    pass


def _epilog(name: str, more: str = "") -> str:
    """The examples of a verb as lines that help keeps as they are."""
    lines = [line.strip() for line in EXAMPLES[name].strip().splitlines()]
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)]) + (f"\n\n{more}" if more else "")


app.command(
    cls=Verb, epilog=_epilog("convert", EPILOG), short_help="Quantize a published checkpoint, in little memory."
)(convert)
app.command(cls=Verb, epilog=_epilog("generate"), short_help="Answer a prompt.")(generate)
app.command(cls=Verb, epilog=_epilog("chat"), short_help="Talk; every turn costs only what is new.")(chat)
app.command(cls=Verb, epilog=_epilog("infill"), short_help="Fill the holes in a text and print it.")(infill)
app.command(cls=Verb, epilog=_epilog("edit"), short_help="Rewrite some lines of a file; print the diff.")(edit)
app.command(cls=Verb, epilog=_epilog("serve"), short_help="Let apps use the model; a page to watch it.")(serve)
app.command(cls=Verb, epilog=_epilog("demo"), short_help="Run the small checkpoint in this package.")(demo)
app.command(cls=Verb, epilog=_epilog("train"), short_help="Teach the model a task; resumable.")(train)
app.command(cls=Verb, epilog=_epilog("fuse"), short_help="Merge an adapter into a checkpoint.")(fuse)
app.add_typer(models, name="models", epilog=_epilog("models"), short_help="List the models known here; remove one.")
app.add_typer(logs, name="logs", epilog=_epilog("logs"), short_help="List, print or delete kept conversations.")
app.command(cls=Verb, epilog=_epilog("check"), short_help="Read a checkpoint and say what is wrong with it.")(check)
app.command(cls=Verb, epilog=_epilog("replay"), short_help="Play a recorded generation again, or draw it.")(replay)
app.command(cls=Verb, epilog=_epilog("bench"), short_help="Measure this machine, and where the time goes.")(bench)
