"""Is a converted checkpoint whole? Every tensor read, every hash compared, the tokenizer tried, a canvas denoised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.safetensors import INDEX_NAME, ITEM_BYTES, Entry
from ..config import read_json
from ..errors import CheckpointError, DiffusionGemmaError
from ..options import GenerationOptions
from ..paths import user_path
from .reading.names import layout_name
from .reading.reader import NOT_FINITE, SLAB_BYTES, Files, Reader
from .reading.sources import find_weights
from .writing.hashes import file_sha256, known_sha256
from .writing.packaging import check_tokenizer

SAMPLE = 'Grüße, 世界! {"naïve": 🙂}\n'
Tell = Callable[[str], None]
Check = Callable[[Checkpoint], Iterator[str]]  # what is wrong, one sentence each


def check_checkpoint(directory: str | Path, tell: Tell | None = None) -> list[str]:
    """List what is wrong with the converted checkpoint in `directory`, one sentence each; empty when nothing is.

    `tell` is called with the name of every check as it starts.
    """
    return _run(user_path(directory), CHECKS, tell or (lambda _: None))


def check_files(directory: Path) -> list[str]:
    """List what can be told wrong in no time: configuration, names, shapes, types and hashes."""
    return _run(directory, dict(list(CHECKS.items())[:3]), lambda _: None)


def _run(directory: Path, checks: Mapping[str, Check], tell: Tell) -> list[str]:
    try:
        checkpoint = Checkpoint.in_directory(directory)
    except CheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    for name, check in checks.items():
        tell(name)
        try:
            problems += check(checkpoint)
        except DiffusionGemmaError as error:
            problems.append(str(error))
        if problems and name in NEEDED_BY_THE_REST:
            break
    return problems


def _configuration(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.options.end_tokens:
        yield f"{checkpoint.directory} does not say which tokens end a reply; add eos_token_id to its config.json."
    check_tokenizer(checkpoint.directory)


def _layout(checkpoint: Checkpoint) -> Iterator[str]:
    """Names, shapes and types against the configuration, and the configuration against the names."""
    directory, tensors = checkpoint.directory, checkpoint.tensors
    if any(layout_name(name) != name for name in tensors):
        yield f"{directory} is not converted, or not all of it; convert it with `mlx-dg convert {directory}`."
        return
    paths = {weight.path for weight in find_weights(tensors.values(), checkpoint.config)}
    quantization = checkpoint.config.quantization
    overrides = quantization.overrides if quantization else None
    for path in sorted(set(overrides or {}) - paths):
        yield f"config.json says how {path} is quantized, which the model does not have; convert it again."
    total = checkpoint.nbytes
    if (directory / INDEX_NAME).is_file():
        said = (read_json(directory / INDEX_NAME).get("metadata") or {}).get("total_size", total)
        if said != total:
            yield f"{INDEX_NAME} says {said:,} bytes, but the tensors have {total:,}; download or convert it again."


def _hashes(checkpoint: Checkpoint) -> Iterator[str]:
    for name in sorted({entry.file for entry in checkpoint.tensors.values()}):
        known = known_sha256(checkpoint.directory / name)
        if known and file_sha256(checkpoint.directory / name) != known:
            yield f"{name} has changed: its SHA-256 is not {known}; download or convert it again."


def _values(checkpoint: Checkpoint) -> Iterator[str]:
    """Every byte of every tensor is read, and every float must be finite."""
    with UncheckedFiles(checkpoint.directory) as files:
        reader = Reader(files)
        for entry in checkpoint.tensors.values():
            try:
                _read_all(reader, entry)
            except CheckpointError as error:
                yield str(error)


class UncheckedFiles(Files):
    """Files whose hashes are compared elsewhere."""

    def provide(self, name: str) -> Path:
        return self.directory / name


def _read_all(reader: Reader, entry: Entry) -> None:
    if entry.dtype not in NOT_FINITE and entry.dtype not in ("U8", "U32"):
        raise CheckpointError(f"{entry.file}: {entry.name} has the type {entry.dtype}, which no checkpoint here has.")
    size = math.prod(entry.shape)
    column, step = replace(entry, shape=(size, 1)), SLAB_BYTES // ITEM_BYTES[entry.dtype]
    for first in range(0, size, step):
        reader.rows(column, first, min(step, size - first))


def _tokenizer(checkpoint: Checkpoint) -> Iterator[str]:
    from ..processing.processor import Processor

    processor = Processor.from_directory(checkpoint.directory, checkpoint.config)
    tokens = processor.tokenizer.encode(SAMPLE, add_special_tokens=False)
    if processor.tokenizer.decode(tokens) != SAMPLE:
        yield "The tokenizer does not give a text back as it was; copy the model's own tokenizer files there."
    prompt = processor.prompt("Hello")
    if max(*tokens, *prompt.tokens) >= checkpoint.config.text.vocab_size:
        yield "The tokenizer has ids beyond the model's vocabulary; copy the model's own tokenizer files there."


def _canvas(checkpoint: Checkpoint) -> Iterator[str]:
    from ..checkpoints.loading import load
    from ..events import Draft
    from ..generation.replying import stream

    model, processor = load(checkpoint.directory)
    options = GenerationOptions(max_steps=2, max_tokens=model.config.canvas_length, seed=0)
    drafts = [event for event in stream(model, processor, "Hello", options=options) if isinstance(event, Draft)]
    if not drafts or not all(math.isfinite(value) for draft in drafts for value in draft.entropy):
        yield "Denoising a canvas gives values that are not finite; convert the checkpoint again, in bfloat16."


CHECKS: dict[str, Check] = {
    "configuration": _configuration,
    "names, shapes and types": _layout,
    "hashes": _hashes,
    "values": _values,
    "tokenizer": _tokenizer,
    "one canvas": _canvas,
}
NEEDED_BY_THE_REST = {"configuration", "names, shapes and types", "values", "tokenizer"}
