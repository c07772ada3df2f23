"""The verb `mlx-dg models`: what was converted or used, and removing it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import read_json
from ..errors import DiffusionGemmaError, PromptError
from .common import Verb, notice, say

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.remembered import Remembered

# Files of a checkpoint, as `mlx-dg convert`, mlx-vlm and the hub write them; nothing else is ever deleted.
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "conversion.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "README.md",
    ".gitattributes",
)

models = typer.Typer(
    help="List the models that were converted or used here, the last used first.",
    rich_markup_mode=None,
    invoke_without_command=True,
)


@models.callback()
def _list(context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    from ..checkpoints.remembered import list_file, remembered

    known = remembered(notice)
    if not known:
        say("No model is known yet; make one with `mlx-dg convert --q4`, or name one with --model.")
        return
    rows = [("NAME", "SIZE", "RECIPE", "FITS", "PATH"), *(_row(model) for model in known)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = ["  ".join([*(f"{cell:<{room}}" for cell, room in zip(row, widths, strict=False)), row[4]]) for row in rows]
    if width is None or max(map(len, lines)) <= width:
        typer.echo("\n".join(lines))
    else:  # a model takes some lines where the terminal is narrow
        typer.echo("\n".join(f"{row[0]}\n  {row[1]} · {row[2]} · fits: {row[3]}\n  {row[4]}" for row in rows[1:]))
    say(f"The first is used where no --model is given. The list is {list_file()}.")


@models.command(
    cls=Verb,
    short_help="Delete a model's files and forget it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name or path that `mlx-dg models` lists.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Only forget it.")] = False,
) -> None:
    """Delete a model's files, after asking, and forget it.

    Only files of a checkpoint are deleted; where others lie beside them, they stay, and so does the directory.
    """
    from ..checkpoints.remembered import find, forget

    model = find(name)
    files = [] if keep_files else _files(model)
    if files:
        size = _size(sum(file.stat().st_size for file in files))
        if not yes:
            if not can_ask():
                raise typer.BadParameter("give --yes where nobody can be asked.", param_hint="'--yes'")
            count = f"{len(files)} file{'s' * (len(files) != 1)}"
            if not typer.confirm(f"Delete {count}, {size}, of {model.source}?", err=True):
                say("Nothing is deleted.")
                return
        _delete(model, files)
        say(f"Deleted {size} of {model.source}.")
    forget(model.name)
    say(f"{model.name} is forgotten.")


def can_ask() -> bool:
    """Whether there is somebody to answer a question."""
    return sys.stdin.isatty()


def _row(model: Remembered) -> tuple[str, str, str, str, str]:
    """What there is to say of a model without loading it."""
    from ..checkpoints.checkpoint import Checkpoint

    directory = _directory(model)
    if directory is None:
        return model.name, "–", "–", "missing" if not model.is_repository else "not here", model.source
    try:
        checkpoint = Checkpoint.in_directory(directory)
    except DiffusionGemmaError:
        return model.name, "–", "–", "damaged", model.source
    return model.name, _size(checkpoint.nbytes), _recipe(checkpoint), _fits(checkpoint), model.source


def _recipe(checkpoint: Checkpoint) -> str:
    from ..convert.writing.hashes import REPORT

    quantization = checkpoint.config.quantization
    if quantization is None:
        return "unquantized"
    kind = f"{quantization.bits}-bit"
    if quantization.mode != "affine":
        kind = quantization.mode
    report = checkpoint.directory / REPORT
    try:
        recipe = read_json(report).get("recipe") if report.is_file() else None
    except DiffusionGemmaError:
        recipe = None
    return f"{recipe}, {kind}" if isinstance(recipe, str) else kind


def _fits(checkpoint: Checkpoint) -> str:
    """Whether it runs on this machine, as `check_fits` decides when it is loaded."""
    from ..checkpoints.accounting import CONTEXT, memory_needed
    from ..checkpoints.memory import usable_bytes

    limit = usable_bytes()
    least, comfortable = (
        memory_needed(checkpoint.config, checkpoint.nbytes, context, checkpoint.item).total for context in (1, CONTEXT)
    )
    return "yes" if comfortable <= limit else "short prompts" if least <= limit else "no"


def _directory(model: Remembered) -> Path | None:
    """Where the model's files lie on this machine, if they do."""
    if not model.is_repository:
        return Path(model.source) if model.is_there else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _files(model: Remembered) -> list[Path]:
    """The files that belong to the model: of a directory those of a checkpoint, of a repository what the hub cached."""
    directory = Path(model.source)
    if model.is_repository:
        repository = _cached(model.source)
        directory = repository.repo_path if repository else Path()
        return [file for file in directory.rglob("*") if file.is_file() and not file.is_symlink()] if repository else []
    if not directory.is_dir():
        return []
    return sorted({file for pattern in CHECKPOINT_FILES for file in directory.glob(pattern) if file.is_file()})


def _delete(model: Remembered, files: list[Path]) -> None:
    """Raises PromptError where the system refuses."""
    try:
        if model.is_repository:
            repository = _cached(model.source)
            if repository:
                shutil.rmtree(repository.repo_path)
            return
        for file in files:
            file.unlink()
        directory = Path(model.source)
        left = list(directory.iterdir())
        if left:
            say(f"{len(left)} other file{'s' * (len(left) != 1)} stay in {directory}.")
        else:
            directory.rmdir()
    except OSError as error:
        raise PromptError(f"{error.filename} cannot be deleted ({error.strerror}); check its permissions.") from None


def _cached(repository: str) -> CachedRepoInfo | None:
    """What the hub's cache holds of a repository."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return None
    return next((found for found in repositories if (found.repo_type, found.repo_id) == ("model", repository)), None)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
